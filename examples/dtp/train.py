r"""Train a restoration network that generates before it restores, and does not forget it: DTP.

    python -m examples.dtp.train --method pretrain --out runs/pretrained                        # TMGP
    python -m examples.dtp.train --method gef_project --pretrained runs/pretrained --out runs/gef       # GEF, setting A
    python -m examples.dtp.train --method gef_project --pretrained runs/pretrained --out runs/all \
        --degradations '[noisy,rainy,snowy,hazy]' --moe true                                    # TIT + MoE, setting B
    python -m examples.dtp.train --evaluate runs/gef --data folders --pairs '{rainy: rain100h:DATA}' --out runs/other

The loop is ``Recipe.run`` of examples/common/engine/recipe.py; networks, losses and evaluation are in pretrain.py and
finetune.py.

Every option of examples/dtp/config.py may stand in a YAML file (--config) or on the command line, which wins. The same
command resumes a killed run. Several processes: ``python -m torch.distributed.run --nproc_per_node 8 -m ...``.
"""

from examples.common.data.pairs import check_pair_options
from examples.common.engine import command_line
from examples.dtp.config import Config
from examples.dtp.finetune import FineTuning
from examples.dtp.pretrain import Pretraining


def trainer(config: Config) -> Pretraining | FineTuning:
    """The run that the method asks for."""
    check_pair_options(config, own_names=config.evaluate is not None)
    if config.method != "pretrain":
        return FineTuning(config)
    if config.aggregator:
        raise ValueError("`aggregator` should be left out for 'pretrain': it is for 'project'.")
    return Pretraining(config)


def main() -> None:
    command_line.run(Config, lambda config: trainer(config).run(), __doc__)


if __name__ == "__main__":
    main()
