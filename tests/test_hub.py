"""Plans on the Hugging Face Hub, against a hub in memory: what is sent, what is asked for, and what the card says."""

import fnmatch
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from tiny_models import TWO_PHASES, random_plan, tiny_pipeline, tiny_wan, wan_inputs

from paroattn.cli import main
from paroattn.grid import TextSpan
from paroattn.integration.apply import apply, remove
from paroattn.integration.calibrate import calibrate
from paroattn.plan.card import model_card
from paroattn.plan.plan import Plan, PlanError, own_config

FILES = ["README.md", "transformer/plan.json", "transformer/plan.safetensors"]


class Hub:
    """Repositories in memory: commits of files, newest last, and branches."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, []
        self.repositories: dict[str, dict[str, Any]] = {}

    def api(self, token=None):
        self.seen.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        assert exist_ok
        self.repositories.setdefault(repo_id, {"private": private, "main": {}})

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision=None, delete_patterns=()):
        branch = self.repositories[repo_id].setdefault(revision or "main", {})
        for name in [n for n in branch if any(fnmatch.fnmatch(n, pattern) for pattern in delete_patterns)]:
            del branch[name]
        root = Path(folder_path)
        branch |= {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        self.seen.append(("commit", commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision=None, token=None, allow_patterns=()):
        self.seen.append(("download", repo_id, revision, token, tuple(allow_patterns)))
        if repo_id not in self.repositories:
            raise RepositoryNotFoundError(f"404 for {repo_id}", response=_no_response())
        if (revision or "main") not in self.repositories[repo_id]:
            raise RevisionNotFoundError(f"404 for revision {revision}", response=_no_response())
        target = self.folder / f"{repo_id.replace('/', '--')}-{revision}"
        shutil.rmtree(target, ignore_errors=True)
        for name, content in self.repositories[repo_id][revision or "main"].items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(content)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)


def _no_response() -> Any:
    return SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.HfApi", hub.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return hub


def plan_of(**changes: Any) -> Plan:
    plan = random_plan(density=0.4, phases=TWO_PHASES, **changes)
    return Plan({"transformer": replace(plan, config=own_config(tiny_wan()))})


def forward(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**wan_inputs()).sample


def test_a_plan_goes_to_the_hub_and_comes_back(hub):
    plan = plan_of()
    url = plan.push_to_hub("me/wan-plan", private=True, token="secret")
    assert url == "https://hub/me/wan-plan/commit/1"
    assert sorted(hub.repositories["me/wan-plan"]["main"]) == FILES and hub.repositories["me/wan-plan"]["private"]
    again = Plan.from_pretrained("me/wan-plan", token="secret")
    assert hub.seen[0] == ("token", "secret") and hub.seen[-1][:4] == ("download", "me/wan-plan", None, "secret")
    pipes = [tiny_pipeline(), tiny_pipeline()]
    for pipe, each in zip(pipes, (plan, again), strict=True):
        apply(pipe, each)
    assert torch.equal(pipes[0](3).frames, pipes[1](3).frames)


def test_only_a_plans_own_files_are_asked_for(hub):
    plan_of().push_to_hub("me/plan")
    hub.repositories["me/plan"]["main"] |= {
        "plan.py": b"raise SystemExit", "transformer/pytorch_model.bin": b"\x80", "x/transformer/plan.json": b"{}",
        "unet/plan.json": b"{}",
    }  # fmt: skip
    Plan.from_pretrained("me/plan")
    *_, patterns = hub.seen[-1]
    assert set(patterns) == {
        f"{name}/{file}" for name in ("transformer", "transformer_2") for file in ("plan.json", "plan.safetensors")
    }
    got = {str(path.relative_to(hub.folder)).partition("/")[2] for path in hub.folder.rglob("*") if path.is_file()}
    assert got == {"transformer/plan.json", "transformer/plan.safetensors"}


def test_revisions_are_kept_apart(hub):
    plan_of(seed=1).push_to_hub("me/plan")
    plan_of(seed=2).push_to_hub("me/plan", revision="dense-text")
    one, two = (Plan.from_pretrained("me/plan", revision=name)["transformer"] for name in (None, "dense-text"))
    assert [part.layers["blocks.0.attn1"].orders for part in (one, two)] == [
        plan_of(seed=seed)["transformer"].layers["blocks.0.attn1"].orders for seed in (1, 2)
    ]
    assert one.density != two.density


def test_what_is_not_there_is_named(hub, monkeypatch):
    with pytest.raises(PlanError, match=r"'me/nothing' is neither a folder nor a plan on the Hugging Face Hub: .*404"):
        Plan.from_pretrained("me/nothing")
    plan_of().push_to_hub("me/plan")
    with pytest.raises(PlanError, match=r"'me/plan' is neither .* at revision 'v9': .*404 for revision v9"):
        Plan.from_pretrained("me/plan", revision="v9")
    hub.repositories["me/model"] = {"main": {"model_index.json": b"{}"}}
    with pytest.raises(PlanError, match=r"me/model holds no plan: expected transformer/plan\.json"):
        Plan.from_pretrained("me/model")

    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("no network and nothing in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(PlanError, match="no network and nothing in the cache"):
        Plan.from_pretrained("me/plan")


def test_half_a_download_is_noticed(hub):
    two = Plan({"transformer": random_plan(seed=1), "transformer_2": random_plan(seed=2)})
    two.push_to_hub("me/plan")
    files = hub.repositories["me/plan"]["main"]
    del files["transformer_2/plan.json"]
    with pytest.raises(PlanError, match="belongs to a plan of transformer, transformer_2; the folder has transformer"):
        Plan.from_pretrained("me/plan")
    del files["transformer/plan.safetensors"]
    with pytest.raises(PlanError, match=r"no plan\.safetensors beside plan\.json"):
        Plan.from_pretrained("me/plan")


def test_a_push_replaces_what_was_there(hub):
    two = Plan({"transformer": random_plan(seed=1), "transformer_2": random_plan(seed=2)})
    two.push_to_hub("me/plan")
    hub.repositories["me/plan"]["main"]["notes.md"] = b"mine"
    plan_of().push_to_hub("me/plan")
    assert sorted(hub.repositories["me/plan"]["main"]) == sorted([*FILES, "notes.md"])
    assert list(Plan.from_pretrained("me/plan")) == ["transformer"]


def test_the_command_line_takes_plans_from_the_hub(hub, capsys):
    plan_of().push_to_hub("me/plan")
    assert main(["show", "me/plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["transformer"]["grid"] == "5x7x6"


# The configuration


def test_a_configuration_holds_what_differs_from_the_class(tmp_path):
    model = tiny_wan()
    config = own_config(model)
    assert config["num_layers"] == 2 and config["patch_size" if "patch_size" in config else "ffn_dim"]
    assert "cross_attn_norm" not in config and not [name for name in config if name.startswith("_")]
    assert own_config(torch.compile(model)) == config
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    again.register_to_config(quantization_config={"load_in_8bit": True})
    assert own_config(again) == config
    assert own_config(tiny_wan(cross_attn_norm=False)) == config | {"cross_attn_norm": False}
    assert own_config(torch.nn.Linear(2, 2)) == {}


def test_a_plan_runs_on_models_with_the_same_configuration_only(tmp_path):
    plan = plan_of()
    plan.save_pretrained(tmp_path / "plan")
    plan = Plan.from_pretrained(tmp_path / "plan")
    fine_tuned = tiny_wan(seed=5)
    apply(fine_tuned, plan["transformer"], strict=True)
    remove(fine_tuned)
    other = tiny_wan(cross_attn_norm=False)
    expected = forward(other)
    with pytest.raises(PlanError) as refused:
        apply(other, plan["transformer"])
    assert "cross_attn_norm at its default" in str(refused.value) and "cross_attn_norm=False" in str(refused.value)
    assert str(plan["transformer"].config_sha256)[:16] in str(refused.value)
    assert torch.equal(forward(other), expected)
    apply(other, replace(plan["transformer"], config=None))


def test_calibration_keeps_the_configuration_the_component_and_the_name(tmp_path, monkeypatch):
    pipe = tiny_pipeline()

    def generate(self, prompt, generator=None, num_inference_steps=2, **call):
        return original(self, num_inference_steps)

    original = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", generate)
    pipe.register_to_config(_name_or_path="maker/model")
    plan = calibrate(pipe, "a cat", steps=2, progress=lambda _: None)["transformer"]
    assert (plan.component, plan.config) == ("transformer", own_config(pipe.transformer))
    assert plan.made["calibration"]["model"] == "maker/model"
    assert "base_model: maker/model\n" in model_card(Plan({"transformer": plan}))
    for private in (str(tmp_path), "plans/mine"):
        (tmp_path / "plans" / "mine").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(tmp_path)
        pipe.register_to_config(_name_or_path=private)
        plan = calibrate(pipe, "a cat", steps=2, progress=lambda _: None)["transformer"]
        assert plan.made["calibration"]["model"] is None and private not in json.dumps(plan.made)


# The card

EVALUATION = {
    "summary": {"psnr": {"mean": 31.42, "spread": 2.1, "lowest": 26.9, "count": 16}, "ssim": {"mean": None}},
    "clips": [{"dense_seconds": 12.0, "sparse_seconds": 5.0}, {"dense_seconds": 8.0, "sparse_seconds": 5.0}],
    "environment": {"device": "NVIDIA H200"},
}


def test_a_card_says_what_is_known(tmp_path):
    part = replace(
        random_plan(density=0.4, phases=TWO_PHASES, text=TextSpan(226, "prefix"), precision="int8"),
        config={"num_layers": 2}, made={"calibration": {"call": {"height": 480, "width": 720, "steps": 3}}},
    )  # fmt: skip
    plan = Plan({"transformer": part})
    card = model_card(plan)
    for line in (
        "library_name: paroattn", "| model | WanTransformer3DModel |", "| self-attentions | 2 of 2 heads × 64 |",
        "| grid | 5x7x6 tokens (frames × height × width), 210 in all |", "| block | 32 query × 64 key tokens |",
        "| pipeline called with | height 480, width 720 |", "| text in the sequence | 226 tokens, prefix |",
        "| precision | int8 (100%) |", part.config_sha256, "| down to 0.600 | 50% |",
        f"| all | 100% | {part.density:.3f} |",
        "Not measured. `paro evaluate",
    ):  # fmt: skip
        assert line in card, line
    assert card.startswith("---\n") and card.count("---\n") == 2 and "base_model" not in card
    measured = model_card(plan, EVALUATION)
    assert "| PSNR, dB | 31.4 | 2.1 | 26.9 | 16 |" in measured and "| SSIM | – | – | – | – |" in measured
    assert (
        "10.0 s a clip dense, 5.0 s with the plan on NVIDIA H200: 2.00×." in measured and "Not measured" not in measured
    )
    plan.save_pretrained(tmp_path / "plan", evaluation=EVALUATION)
    assert (tmp_path / "plan" / "README.md").read_text() == measured


def test_a_card_cannot_be_made_to_say_something_else():
    calibration = {"model": "a/b\nlicense: mit", "prompts": ["```\n# Not this\n````", "a | b"]}
    part = replace(random_plan(), made={"calibration": calibration, "settings": "`````"})
    card = model_card(Plan({"transformer": part}))
    assert "license" not in card.partition("\n# ")[0] and "base_model" not in card
    fence = "`" * 6
    assert card.count(f"\n{fence}") == 2 and card.rstrip().endswith(fence)


def test_a_card_of_two_experts_has_a_part_for_each():
    plan = Plan({"transformer": random_plan(density=0.2), "transformer_2": random_plan(density=0.6, seed=3)})
    card = model_card(plan)
    assert card.count("| self-attentions |") == 2 and "| transformer_2 |" in card
    assert f"{plan['transformer'].density:.3f}" in card and f"{plan['transformer_2'].density:.3f}" in card
