"""What several ranks must do as one process does: `python checks.py WORLD_SIZE [NAME...]` prints figures as JSON.

`test_distributed.py` says how large they may be.
"""

import io
import json
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from processes import run_ranks
from runs import encoded, tiny
from torch.profiler import ProfilerActivity, profile

from sft_edu.accumulate import compare
from sft_edu.ranks.distributed import Ranks
from sft_edu.ranks.sharded import ShardedRanks
from sft_edu.ranks.torchrun import ranks_from_environment
from sft_edu.training.one_process import OneProcess
from sft_edu.training.train import Record, Training
from sft_edu.training.train_config import TrainConfig

ENGINES = {"ddp": Ranks, "fsdp": ShardedRanks}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def flat(tensors) -> torch.Tensor:
    return torch.cat([whole(tensor.detach()).flatten() for tensor in tensors])


def keeps_gradient(engine: type[OneProcess]) -> type[OneProcess]:
    """The engine, which keeps what each optimizer step was given, before clipping."""

    class Keeps(engine):
        def clip(self, model, max_norm):
            self.kept = [*getattr(self, "kept", []), flat(p.grad for p in model.parameters())]
            return super().clip(model, max_norm)

    return Keeps


def without_world_size(engine: type[OneProcess]) -> type[OneProcess]:
    class Wrong(engine):
        def weigh(self, log_probs):
            return log_probs

    return Wrong


def with_local_counts(engine: type[OneProcess]) -> type[OneProcess]:
    class Wrong(engine):
        def count(self, number):
            return number

    return Wrong


def run(engine: type[OneProcess], model=None, examples=None, **config) -> tuple[Training, list[Record]]:
    settings = {"microbatch_size": 3, "gradient_accumulation_steps": 3, "warmup_steps": 2, **config}
    training = Training(model or tiny(), examples or encoded(24), TrainConfig(**settings), ranks=engine())
    return training, list(training)


def gradients() -> dict[str, float]:
    """The largest relative error, against one process, of steps of 5, 3 and 1 microbatches: some ranks have none."""
    figures: dict[str, float] = {}
    cases = [("token_mean", steps, dtype) for steps in (5, 3, 1) for dtype in DTYPES]
    cases += [(rule, 3, "float64") for rule in ("sequence_mean", "microbatch_token_mean", "notes")]
    for rule, steps, dtype in cases:
        config = {"rule": rule, "gradient_accumulation_steps": steps, "optimizer": "sgd"}
        examples = encoded(3 * steps + 2)  # and a last step of two sequences
        one, _ = run(keeps_gradient(OneProcess), tiny(DTYPES[dtype]), examples, **config)
        for name, engine in ENGINES.items():
            variants = {"": engine}
            if (rule, steps) == ("token_mean", 5):
                variants |= {" no world size": without_world_size(engine), " local counts": with_local_counts(engine)}
            for what, variant in variants.items():
                several, _ = run(keeps_gradient(variant), tiny(DTYPES[dtype]), examples, **config)
                # Only the first step starts from the same weights; the second, of few sequences, is close behind.
                pairs = zip(several.ranks.kept, one.ranks.kept, strict=True)
                key = f"{name} {dtype}{what}"
                figures[key] = max(figures.get(key, 0.0), *(compare(a, b).relative_error for a, b in pairs))
    return figures


def curves() -> dict[str, float]:
    """The largest difference of the loss over 50 AdamW steps, from that of one process."""
    config = {"num_epochs": 10, "learning_rate": 1e-3}
    _, one = run(OneProcess, examples=encoded(44), **config)
    assert len(one) == 50
    figures = {}
    variants = {**ENGINES, "no world size": without_world_size(Ranks), "local counts": with_local_counts(Ranks)}
    for name, engine in variants.items():
        _, several = run(engine, examples=encoded(44), **config)
        figures[name] = max(abs(a.nll - b.nll) for a, b in zip(several, one, strict=True))
        if name in ENGINES:
            assert [record.num_tokens for record in several] == [record.num_tokens for record in one]
    return figures


def metrics() -> dict[str, object]:
    """The largest relative difference of any number in a record, in float64; and whether all ranks have the same."""
    config = {"rule": "notes", "max_norm": 0.01}
    _, one = run(OneProcess, tiny(torch.float64), **config)
    figures = {}
    for name, engine in ENGINES.items():
        _, several = run(engine, tiny(torch.float64), **config)
        pairs = [(asdict(a), asdict(b)) for a, b in zip(several, one, strict=True)]
        worst = max(abs(a[key] - b[key]) / abs(b[key]) for a, b in pairs for key in b)
        figures[name] = {"worst": worst, "same": len(set(map(tuple, _of_all_ranks(several)))) == 1}
    return figures


def traffic() -> dict[str, dict[str, int]]:
    """Collectives in an optimizer step of G microbatches for each rank, by their name."""
    figures = {}
    for name, engine in ENGINES.items():
        for rounds in (1, 2, 5):
            steps = rounds * dist.get_world_size()
            config = TrainConfig(microbatch_size=2, gradient_accumulation_steps=steps)
            records = iter(Training(tiny(), encoded(4 * steps), config, ranks=engine()))
            next(records)
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                next(records)
            figures[f"{name} {rounds}"] = Counter(e.name for e in seen.events() if e.name.startswith("c10d::"))
    return figures


def data() -> dict[str, object]:
    """Every microbatch on one rank, each once, and as many rounds on all."""
    ranks, seen = Ranks(), {}
    for count in range(1, 12):
        microbatches = [[number] for number in range(count)]
        shares = _of_all_ranks(ranks.share(microbatches))
        seen[count] = {
            "same": sorted(chain(*chain(*shares))) == list(range(count)),
            "rounds": len({len(share) for share in shares}) == 1,
            "empty": sum(not part for share in shares for part in share),
        }
    return seen


def checkpoints() -> dict[str, object]:
    """A state from the middle of a run, taken up again by each engine."""
    config = {"num_epochs": 2, "microbatch_size": 1, "gradient_accumulation_steps": 6}
    figures = {}
    engines = {"one": OneProcess, **ENGINES}
    for name, engine in engines.items():
        training = Training(Dropped(), encoded(24), _config(config), ranks=engine())
        torch.manual_seed(dist.get_rank())  # each rank drops other values
        steps = iter(training)
        early = [next(steps) for _ in range(5)]
        state = _from_first(training.state_dict())
        empty = not training.state_dict()
        late = list(steps)
        for other_name, other in engines.items():
            torch.manual_seed(99)
            resumed = Training(Dropped(seed=3), encoded(24), _config(config), ranks=other())
            differences = resumed.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
            records = list(resumed)
            figures[f"{name} {other_name}"] = {
                "differences": differences,
                "same": records == late and torch.equal(_weights(resumed), _weights(training)),
                "steps": [early[-1].step, records[0].step, records[-1].step],
                "empty": _of_all_ranks(empty),
            }
    return figures


def changed_ranks() -> dict[str, float]:
    """Without dropout a run goes on with the same losses on another number of ranks; in the middle, too."""
    figures = {}
    _, straight = run(OneProcess, tiny(torch.float64), num_epochs=4)
    for microbatches in (3, 4):
        stopped = Training(tiny(torch.float64), encoded(24), _config({"num_epochs": 4}))
        for _ in range(microbatches):
            stopped.run_microbatch()
        for name, engine in ENGINES.items():
            resumed = Training(tiny(torch.float64), encoded(24), _config({"num_epochs": 4}), ranks=engine())
            resumed.load_state_dict(_copied(stopped.state_dict()))
            records = list(resumed)
            assert records[0].step == 2
            pairs = zip(records, straight[1:], strict=True)
            figures[f"{name} {microbatches}"] = max(abs(a.nll - b.nll) for a, b in pairs)
    return figures


def refusals() -> dict[str, list[str]]:
    """What each rank says where the last was given something else."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    texts = {}
    for what in ("rule", "learning_rate", "pad_token_id", "examples", "num_examples", "model"):
        config, model, examples, pad = _config({}), tiny(), encoded(24), 0
        if is_last:
            config = replace(config, rule="notes") if what == "rule" else config
            config = replace(config, learning_rate=0.1) if what == "learning_rate" else config
            pad = 5 if what == "pad_token_id" else pad
            examples = encoded(24, seed=1) if what == "examples" else examples
            examples = examples[:-1] if what == "num_examples" else examples
            model = tiny(torch.float64) if what == "model" else model
        begin = partial(Training, model, examples, config, pad_token_id=pad, ranks=Ranks())
        texts[what] = _of_all_ranks(_raised(begin))
    engine = list(ENGINES.values())[is_last]
    texts["engine"] = _of_all_ranks(_raised(partial(Training, tiny(), encoded(24), _config({}), ranks=engine())))
    config = _config({"gradient_accumulation_steps": 2 * dist.get_world_size()})
    training = Training(tiny(), encoded(24), config, ranks=Ranks())
    training.run_microbatch()
    texts["in the middle"] = _of_all_ranks(_raised(training.state_dict))
    return texts


def bad_values() -> dict[str, dict[str, object]]:
    """What each rank raises when the last computes NaN in the first or the last round of the second step."""
    world_size = dist.get_world_size()
    figures = {}
    for name, engine in ENGINES.items():
        for broken_round in (0, 1):
            config = _config({"gradient_accumulation_steps": 2 * world_size, "microbatch_size": 1})
            training = Training(tiny(), encoded(24), config, ranks=engine())
            next(iter(training))
            before = _weights(training)
            calls = iter(range(100))

            def spoil(module, inputs, output, calls=calls, broken_round=broken_round):
                is_broken = dist.get_rank() == world_size - 1 and next(calls) == broken_round
                return output * float("nan") if is_broken else output

            training.model.register_forward_hook(spoil)
            texts = _of_all_ranks(_raised(partial(list, training)))
            figures[f"{name} {broken_round}"] = {"texts": texts, "same": torch.equal(before, _weights(training))}
    return figures


def weights_and_stops() -> dict[str, object]:
    """Other weights on each rank become those of the first; one rank is enough to stop, between steps only."""
    figures = {}
    for name, engine in ENGINES.items():
        config = _config({"gradient_accumulation_steps": 2 * dist.get_world_size(), "microbatch_size": 1})
        training = Training(tiny(seed=dist.get_rank()), encoded(24), config, ranks=engine())
        figures[name] = torch.equal(_weights(training), flat(tiny(seed=0).parameters()))
        asks = dist.get_rank() == dist.get_world_size() - 1
        stops = [training.agree_to_stop(lambda: False), training.agree_to_stop(lambda asks=asks: asks)]
        training.run_microbatch()
        stops.append(training.agree_to_stop(lambda: True))
        figures[f"{name} stops"] = _of_all_ranks(stops)
    return figures


class Dropped(torch.nn.Module):
    """A model that draws random numbers in each forward."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner, self.dropout = tiny(seed=seed), torch.nn.Dropout(0.2)
        self.inner.final_norm.register_forward_hook(lambda module, inputs, output: self.dropout(output))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)


def _config(config: dict) -> TrainConfig:
    return TrainConfig(**{"microbatch_size": 3, "gradient_accumulation_steps": 3, "warmup_steps": 2, **config})


def _weights(training: Training) -> torch.Tensor:
    return flat(training.model.parameters())


def _copied(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def _from_first(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = [buffer.getvalue()]
    dist.broadcast_object_list(content)
    return content[0]


def _of_all_ranks(value: object) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _raised(work) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


CHECKS = (gradients, curves, metrics, data, checkpoints, bad_values)
NOT_OF_MANY = (traffic, changed_ranks, refusals, weights_and_stops)
"""What four ranks, on fewer cores, would not do otherwise than two."""


def check_all(rank: int) -> None:
    with ranks_from_environment():
        checks = CHECKS if dist.get_world_size() > 2 else CHECKS + NOT_OF_MANY
        chosen = sys.argv[2:] or [check.__name__ for check in checks]
        figures = {check.__name__: check() for check in checks if check.__name__ in chosen}
    if rank == 0:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(any(run_ranks(check_all, int(sys.argv[1]), seconds=280)))
