"""A training config: YAML and key=value in, a TrainConfig out, or one sentence about what is wrong."""

from itertools import pairwise
from pathlib import Path

import pytest

from kanyun.errors import UserError
from trainer.config import TrainConfig, load_config
from trainer.optim.optimizer import learning_rate

GOOD = """
model: models/tiny # a comment
data: packed
output: ${model}/runs
length: 64
global_batch: 4
steps: 10
lr: 1e-3
"""


def load(tmp_path: Path, text: str, *changes: str) -> TrainConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load_config(str(path), list(changes))


def test_file_and_changes(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "lr=5e-4", "steps=null", "epochs=2", "trainable=language+merger", "validation=held")
    assert (config.lr, config.steps, config.epochs) == (5e-4, None, 2)
    assert (config.output, config.trainable, config.validation) == ("models/tiny/runs", "language+merger", "held")
    assert (config.init, config.min_lr, config.seed) == ("random", 0.0, 0)
    with pytest.raises(ValueError, match="frozen"):
        config.lr = 1.0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["globl_batch=3"], "unknown key 'globl_batch' in the config: did you mean 'global_batch'?"),
        (["micro_batch=1"], "unknown key 'micro_batch'"),  # speed is no fact of a run
        (["length=long"], "length is 'long': it should be a valid integer"),
        (["length=6.5"], "length is 6.5: it should be a valid integer"),
        (["global_batch=0"], "global_batch is 0: it should be greater than 0"),
        (["lr=.nan"], "lr is nan: it should be a finite number"),
        (["seed=true"], "seed is True: it should be a valid integer"),
        (["epochs=1"], "give steps or epochs, one of them: steps is 10, epochs is 1"),
        (["steps=null"], "give steps or epochs, one of them: steps is None, epochs is None"),
        (["min_lr=1"], "min_lr 1.0 is above lr 0.001"),
        (["adam_beta2=0.999"], "adam_beta2 is 0.999: moments are bfloat16 on a GPU"),
        (["data=[a"], "not a YAML file"),
        (["lr=-1", "stps=4"], "lr is -1: it should be greater than 0; unknown key 'stps' in the config"),
    ],
)
def test_one_sentence_for_each_thing_that_is_wrong(tmp_path: Path, changes: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, GOOD, *changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr: 1\nlr: 2", "duplicate key"),
        ("- lr", "not a YAML file of `key: value` lines"),
        ("lr: [", "not a YAML file of `key: value` lines"),
        (GOOD.replace("data: packed\n", ""), "the config has no data: add `data: ...`"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config .*none\.yaml"):
        load_config(str(tmp_path / "none.yaml"), [])


def test_warm_up_then_half_a_cosine(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "warmup_steps=4", "min_lr=1e-4")
    rates = [learning_rate(config, step, 12) for step in range(12)]
    assert rates[:5] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert rates[8] == pytest.approx((1e-3 + 1e-4) / 2)  # half-way through the 8 steps after the warm-up
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert 1e-4 < rates[11] < 1.4e-4  # min_lr would be that of the step after
