"""Configuration of the site: ``sphinx-build -W docs build/site``."""

import sys
from pathlib import Path
from typing import Any

from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parents[1]))

import restoreloss
from restoreloss import restorers

project = "restoreloss"
author = "the restoreloss authors"
version = release = restoreloss.__version__
copyright = author  # noqa: A001, the name that Sphinx reads

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax itself, so that the site needs no network
    "sphinx_copybutton",
]
root_doc = "index"
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"restoreloss {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style, pygments_dark_style = "tango", "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as forges render it

autosummary_generate = True
autosummary_context = {"exported": [*restoreloss.__all__, *restorers.__all__]}  # these have pages of their own
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def resolve_short_name(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Link ``:class:`DiffLoss``` to the exported name, or to the one object of that name, from every docstring."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"]
    exported = f"restoreloss.{target}"
    found = [(exported, domain.objects[exported])] if exported in domain.objects else []
    found = found or domain.find_obj(env, None, None, target, None, searchmode=1)
    found = [match for match in found if not match[1].aliased] or found
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", resolve_short_name)
