"""Wrong uses of mixtures and corruptions."""

from functools import partial
from typing import Any

from restoreloss import Corruptions, CQMix, MixtureA, MixtureB, WaveletColorFix, corrupt
from tests.contract.wrong_uses.table import wrong
from tests.contract.wrong_uses.things import (
    ARRAY,
    NOT_GENERATORS,
    NOT_IMAGES,
    NOT_RANGES,
    NOT_TENSORS,
    clean,
    restored,
    seeded,
)

ONE_IMAGE: dict[str, Any] = {
    "MixtureA": lambda v: MixtureA()(v),
    "MixtureB": lambda v: MixtureB()(v),
    "Corruptions": lambda v: Corruptions()(v),
    "corrupt": lambda v: corrupt(v, "fog", 1),
}
NAMES = {"MixtureA": "`images`", "MixtureB": "`images`", "Corruptions": "`image`", "corrupt": "`image`"}
RANGED: dict[str, Any] = {"MixtureA": MixtureA, "MixtureB": MixtureB, "Corruptions": Corruptions}

WRONG = [
    *(wrong(n, f"{k} for the images", partial(f, v), NAMES[n]) for n, f in ONE_IMAGE.items() for k, v in NOT_TENSORS.items()),
    *(wrong(n, f"images that are {k}", partial(lambda f, v: f(v()), f, v), NAMES[n]) for n, f in ONE_IMAGE.items() for k, v in NOT_IMAGES.items()),
    *(wrong(n, f"{k} for the images", partial(lambda f, v: f(v()), f, v), NAMES[n], by=Warning) for n, f in ONE_IMAGE.items() for k, v in {"0..255": lambda: 255 * clean(), "-1..1": lambda: 2 * clean() - 1}.items()),
    *(wrong(n, f"{k} for the images", partial(lambda f, v: f(v()), f, v), NAMES[n]) for n, f in ONE_IMAGE.items() for k, v in {"grey": lambda: clean(channels=1), "channels last": lambda: clean(2, 8, 8, 3), "alpha": lambda: clean(channels=4)}.items() if n not in ("MixtureA", "MixtureB") or k == "channels last"),
    *(wrong(n, f"input_range={k}", partial(f, input_range=v), "`input_range`") for n, f in RANGED.items() for k, v in NOT_RANGES.items()),
    *(wrong(n, "an unknown option", partial(f, p=0.5), "p", by=TypeError) for n, f in RANGED.items()),
    *(wrong("MixtureA", f"scale={v!r}", partial(MixtureA, v), "`scale`") for v in (0, -1, "8", None, float("nan"), 0.5, True, (1, 8))),
    *(wrong("MixtureA", f"quality={v!r}", partial(MixtureA, quality=v), "`quality`") for v in (0, 101, "75", None, 7.5, True, (1, 8))),
    *(wrong("MixtureA", f"generator={k}", partial(lambda v: MixtureA()(clean(), generator=v), v), "generator", by=TypeError) for k, v in {"one": seeded()}.items()),
    *(wrong("MixtureB", f"{o}={v!r}", partial(MixtureB, **{o: v}), f"`{o}`") for o in ("sigma", "scale", "noise") for v in (1.0, (2.0, 1.0), (-1.0, 1.0), ("1", "2"), None, (1.0,), (1.0, float("nan")), "1,2", (True, 2.0))),
    *(wrong("MixtureB", f"quality={v!r}", partial(MixtureB, quality=v), "`quality`") for v in (50, (100, 50), (0, 50), (50, 101), (0.5, 0.9), ("1", "2"), None)),
    *(wrong("MixtureB", f"anisotropic={v!r}", partial(MixtureB, anisotropic=v), "`anisotropic`") for v in (-0.1, 1.1, "0.5", None, float("nan"), True)),
    *(wrong("MixtureB", f"kernel_size={v!r}", partial(MixtureB, kernel_size=v), "`kernel_size`") for v in (0, -1, 4, "41", None, 4.5, True)),
    wrong("MixtureB", "options by place", lambda: MixtureB((0.1, 8.0)), "positional", by=TypeError),
    *(wrong("MixtureB", f"generator={k}", partial(lambda v: MixtureB()(clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("MixtureB", "one generator for each sample", lambda: MixtureB()(clean(), generator=[seeded()] * 2), "`generator`"),
    *(wrong("MixtureB", f".draw({v!r})", partial(lambda v: MixtureB().draw(v), v), "`count`") for v in (-1, "2", 1.5, None)),
    wrong("MixtureB", ".degrade by a name", lambda: MixtureB().degrade(clean(), "blur"), "`what`"),
    *(wrong("Corruptions", f"names={v!r}", partial(Corruptions, v), "`names`") for v in ("fog", [], ["rain"], None, 5, [1], ["Fog"], {"fog"})),
    *(wrong("Corruptions", f"severities={v!r}", partial(Corruptions, severities=v), "`severities`") for v in (3, [], [0], [6], ["1"], None, [1.5], [True])),
    *(wrong("Corruptions", f"generator={k}", partial(lambda v: Corruptions()(clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("Corruptions", "generators for another batch", lambda: Corruptions()(clean(), generator=[seeded()] * 3), "`generator`"),
    *(wrong("Corruptions", f".draw({v!r})", partial(lambda v: Corruptions().draw(v), v), "`count`") for v in (-1, "2", 1.5, None)),
    *(wrong("corrupt", f"name={v!r}", partial(corrupt, clean(), v, 1), "`name`") for v in ("rain", None, 3, ["fog"], ["fog", "rain"], [], "Fog", {"fog": 1})),
    *(wrong("corrupt", f"severity={v!r}", partial(corrupt, clean(), "fog", v), "`severity`") for v in (0, 6, "3", None, 1.5, [1], [1, 9], True, -1)),
    *(wrong("corrupt", f"generator={k}", partial(lambda v: corrupt(clean(), "fog", 1, generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("corrupt", "generators for another batch", lambda: corrupt(clean(), "fog", 1, generator=[seeded()] * 3), "`generator`"),
    wrong("corrupt", "exchanged name and severity", lambda: corrupt(clean(), 1, "fog"), "name"),
    wrong("corrupt", "no severity", lambda: corrupt(clean(), "fog"), "severity", by=TypeError),
    wrong("corrupt", "images of few pixels", lambda: corrupt(clean(2, 3, 4, 4), "fog", 1), "`image`"),
    # --- CQMix
    *(wrong("CQMix", f"grid={v!r}", partial(CQMix, v), "`grid") for v in (4, (0, 4), (4, -1), (4,), "4x4", None, (1.5, 2), (4, 4, 4), (True, 4))),
    *(wrong("CQMix", f"p={v!r}", partial(CQMix, p=v), "`p`") for v in (-0.1, 1.5, "0.5", None, float("nan"), True)),
    wrong("CQMix", "an unknown option", lambda: CQMix(cells=4), "cells", by=TypeError),
    *(wrong("CQMix", f"{k} for restored", partial(lambda v: CQMix()(v, clean()), v), "`restored`") for k, v in NOT_TENSORS.items()),
    *(wrong("CQMix", f"{k} for target", partial(lambda v: CQMix()(restored(), v), v), "`target`") for k, v in NOT_TENSORS.items()),
    *(wrong("CQMix", f"{k} for both", partial(lambda v: CQMix()(v(), v()), v), "`restored`") for k, v in NOT_IMAGES.items() if k in ("(C, H, W)", "(N, C, T, H, W)", "(H, W)", "no pixel")),
    wrong("CQMix", "images of two sizes", lambda: CQMix()(restored(), clean(size=9)), "`target`"),
    wrong("CQMix", "one target for two", lambda: CQMix()(restored(), clean(1, 3, 8, 8)), "`target`"),
    wrong("CQMix", "a target in whole numbers", lambda: CQMix()(restored(), (255 * clean()).byte()), "`target`"),
    wrong("CQMix", "lists of other lengths", lambda: CQMix()([restored(3, 8, 8)], [clean(3, 8, 8)] * 2), "`target`"),
    wrong("CQMix", "a list beside a batch", lambda: CQMix()([restored(3, 8, 8)], clean(1, 3, 8, 8)), "`restored`"),
    *(wrong("CQMix", f"generator={k}", partial(lambda v: CQMix()(restored(), clean(), generator=v), v), "`generator`") for k, v in NOT_GENERATORS.items()),
    wrong("CQMix", "too many generators", lambda: CQMix()(restored(), clean(), generator=[seeded()] * 9), "`generator`"),
    # --- color
    *(wrong("WaveletColorFix", f"levels={v!r}", partial(WaveletColorFix, v), "`levels`") for v in (0, -1, "5", 1.5, None, True)),
    *(wrong("WaveletColorFix", f"wavelet={v!r}", partial(WaveletColorFix, wavelet=v), "`wavelet`") for v in ("haarr", 5, "")),
    *(wrong("WaveletColorFix", f"{k} for detail", partial(lambda v: WaveletColorFix()(v, clean()), v), "`detail`") for k, v in NOT_TENSORS.items()),
    *(wrong("WaveletColorFix", f"{k} for color", partial(lambda v: WaveletColorFix()(clean(), v), v), "`color`") for k, v in NOT_TENSORS.items()),
    *(wrong("WaveletColorFix", f"{k} for both", partial(lambda v: WaveletColorFix()(v(), v()), v), "`detail`") for k, v in NOT_IMAGES.items()),
    wrong("WaveletColorFix", "images of two sizes", lambda: WaveletColorFix()(clean(), clean(size=9)), "`color`"),
    wrong("WaveletColorFix", "an image alone", lambda: WaveletColorFix()(clean()), "color", by=TypeError),
    wrong("WaveletColorFix", ".low of an array", lambda: WaveletColorFix().low(ARRAY), "`image`"),
    wrong("WaveletColorFix", ".high of None", lambda: WaveletColorFix().high(None), "`image`"),
]  # fmt: skip
