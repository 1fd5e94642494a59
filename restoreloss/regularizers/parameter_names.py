"""Names of parameters without what wrappers add, and names of buffers that are made of them."""

import re

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")


def plain_name(name: str) -> str:
    """The name of a parameter without what ``torch.compile``, FSDP and checkpointing add."""
    return _WRAPPERS.sub("", name).removeprefix(".")


def buffer_name(task: int, kind: str, name: str) -> str:
    """The name of the buffer of one kind for a parameter in one task; a buffer's name may hold no dot."""
    return f"{task}/{kind}/{plain_name(name).replace('%', '%25').replace('/', '%2F').replace('.', '/')}"


def parameter_name(key: str) -> str:
    """The name of a parameter out of that of a buffer, without the task and the kind."""
    return key.replace("/", ".").replace("%2F", "/").replace("%25", "%")
