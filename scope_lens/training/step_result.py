"""The record of one update, and the name of the dictionary that made it."""

from dataclasses import dataclass

from scope_lens.evaluation import EvalResult
from scope_lens.releases import Hooks, place_of, width_name
from scope_lens.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One update of one dictionary; the numbers are those of its batch, before the update.

    Attributes:
        index: Which of the trainer's configs.
        name: Its name, `config_name(index, cfg)`.
        step: Updates made, this one included.
        loss: What was minimised, normalised units.
        fvu: Squared error over the squared distance from the batch's mean, a fraction.
        l0: Mean number of active latents of a row.
        dead: Fraction of latents that did not fire in the last `dead_after` rows.
        tokens_per_second: Rows this dictionary took in over the wall time of the trainer's updates, reading the rows
            and training the other dictionaries included, since its last result.
        evaluation: What `evaluate` measured on held-out text after this update; None where it was not due.
    """

    index: int
    name: str
    step: int
    loss: float
    fvu: float
    l0: float
    dead: float
    tokens_per_second: float
    evaluation: EvalResult | None = None


def config_name(index: int, cfg: TrainConfig) -> str:
    """Name the dictionary of a config within its run, e.g. "0_res_layer_1_width_1k"; fit for a file name.

    Args:
        index: Its place among the run's configs, which makes the name unique.
        cfg: The config.
    """
    place = place_of(Hooks(cfg.hook_in, cfg.hook_out))
    if place is None:
        where = cfg.hook_in if cfg.hook_in == cfg.hook_out else f"{cfg.hook_in}-{cfg.hook_out}"
    elif place.layer is None:
        where = place.site
    else:
        where = f"{place.site}_layer_{place.layer}"
    return f"{index}_{where}_width_{width_name(cfg.width)}"
