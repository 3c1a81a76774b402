"""What the cost model says of the rows of end_to_end_GPU.json."""

from paroattn.block_mask import parse_block
from paroattn.evaluation.forecast import predict
from paroattn.plan.cost import MODES, Rates, gpus, rates_of
from paroattn.plan.workloads import WORKLOADS, Workload

PREDICTED = ("stock", "cudnn", "paroattn")
"""Stock diffusers takes cuDNN's attention on the GPUs that are measured, …"""
MASKED = ("hunyuanvideo",)
"""… but here with a mask over padded text, which takes longer and has no rate."""


def model_of(row: dict) -> tuple[Workload, str]:
    """A row's model and size, from names such as "wan-14b-720p"."""
    name, _, size = row["model"].rpartition("-")
    if name not in WORKLOADS:
        name, size = row["model"], ""
    model = WORKLOADS[name]
    return model, size or next(iter(model.sizes))


def forward_ms(rates: Rates, row: dict) -> float:
    """One forward with what is on in a row."""
    model, size = model_of(row)
    ours = row["impl"] == "paroattn"
    block = parse_block(row["block"]) if ours else (64, 64)
    precisions = (row["precision"],) if ours else ()
    found = predict(rates, model, size, row["density"], precisions, block=block, fp8_linears=row["fp8_linears"])
    return found.forward_ms(row["precision"] if ours else None, MODES[row["compiled"]])


def predictable(row: dict) -> bool:
    """Whether the cost model speaks of what is on in a row."""
    masked = row["impl"] == "stock" and model_of(row)[0].name in MASKED
    return row["impl"] in PREDICTED and not row["step_cache"] and not masked


def predicted_ms(row: dict) -> float | None:
    """The same with the packaged rates of the row's GPU; None where nothing is known."""
    return forward_ms(rates_of(row["device"]), row) if row["device"] in gpus() and predictable(row) else None
