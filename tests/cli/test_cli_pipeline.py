"""``dlms distill --pipeline`` on tiny pipelines with text encoders, from disk to disk."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow

diffusers = pytest.importorskip("diffusers", reason="needs the extra: dlms-engine[diffusers]")
pytest.importorskip("transformers", reason="the tiny pipelines need transformers")
import tiny_pipelines as tiny  # noqa: E402
from commands import run  # noqa: E402

from dlms_engine.integrations.diffusers import DLMSScheduler  # noqa: E402
from dlms_engine.integrations.pipelines import prompt_calls as calls  # noqa: E402
from dlms_engine.integrations.pipelines.distill import load_pipeline, pipeline_denoiser  # noqa: E402
from dlms_engine.learners.dlms.objective import Dlms  # noqa: E402
from dlms_engine.policies.distilled import load_solver  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a cat", "dog", "the sea at night", "rain", "a b c"]
QUICK = ["--set=batch=4", "--set=validation_samples=4", "--set=validation_steps=8"]
CALL = ["--call=height=16", "--call=width=16"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Stable Diffusion pipeline on disk, and a prompt file."""
    tiny.sd(text=tiny.clip(tmp_path / "words")).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path


def command(folder: Path, *more: object) -> list[object]:
    return [
        "distill", "--pipeline", folder / "model", "--prompts", folder / "prompts.txt", "--nfe", 3,
        "--guidance-scale", 2.5, "--trajectories", 24, "--method", "dlms", *QUICK, *CALL, *more,
    ]  # fmt: skip


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dlms: ")
    return error


def test_one_command_from_a_pipeline_to_a_scheduler(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result loads without pickle, runs in the pipeline, and is no worse than its start."""
    assert run(*command(folder, "--output", folder / "solver", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["best"]["score"] <= facts["initial"]
    assert facts["best"]["set"] != "raw@0", "nothing was learned: the test would show nothing"
    written = {path.name for path in (folder / "solver").iterdir()}
    config = "dlms_solver.config.json"
    assert written == {"scheduler_config.json", "dlms_solver.safetensors", config}
    asked = json.loads((folder / "solver" / config).read_text())
    assert asked["pipeline"] == str(folder / "model") and asked["guidance_scale"] == 2.5
    assert asked["nfe"] == 3 and asked["settings"]["lr"] > 0
    again = ("distill", "--config", folder / "solver" / config, "--show-config", "--json")
    assert run(*again) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == asked["settings"]
    scheduler = DLMSScheduler.from_pretrained(folder / "solver")
    assert scheduler.solver.nfe == 3 and scheduler.solver.method == "dlms"
    assert run("inspect", folder / "solver") == 0 and "dlms" in capsys.readouterr().out
    assert run("inspect", folder / "model") != 0  # planted: a directory without a solver
    assert "without dlms_solver.safetensors" in capsys.readouterr().err
    pipe = load_pipeline(folder / "model")
    pipe.scheduler = scheduler
    again = folder / "again"
    asked = {"prompt": "a cat", "height": 16, "width": 16, "output_type": "latent"}
    images = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        images.append(pipe(**asked, num_inference_steps=3, generator=generator).images)
        pipe.scheduler.save_pretrained(again)
        pipe.scheduler = DLMSScheduler.from_pretrained(again)
    assert torch.equal(*images) and bool(images[0].isfinite().all())
    hub = inspect.signature(DLMSScheduler.save_pretrained).parameters
    assert "push_to_hub" in hub and callable(DLMSScheduler.push_to_hub)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the fourth update and resumed: bit for bit the solver of a run that was not."""
    assert run(*command(folder, "--output", folder / "whole", "--json")) == 0
    iteration = Dlms.iteration

    def interrupted(self: Any, noise: torch.Tensor) -> Any:
        if self.progress >= 3 / 6:
            raise KeyboardInterrupt
        return iteration(self, noise)

    asked = command(folder, "--output", folder / "solver", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(Dlms, "iteration", interrupted)
        assert run(*asked) == 130
    assert not (folder / "solver" / "scheduler_config.json").exists()
    assert run(*asked, "--resume") == 0, capsys.readouterr().err
    name = "dlms_solver.safetensors"
    assert (folder / "solver" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    written = {path.name for path in (folder / "solver").iterdir()}
    assert written == {"scheduler_config.json", name, "dlms_solver.config.json"}


@pytest.mark.slow
def test_push_to_hub_uploads_the_solver_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder handed to the hub's client holds both files; nothing is sent."""
    assert run(*command(folder, "--output", folder / "solver", "--json")) == 0
    scheduler = DLMSScheduler.from_pretrained(folder / "solver")
    sent: list[set[str]] = []

    class Repository:
        repo_id = "someone/solver"

    def upload(self: Any, working_dir: Any, *_: Any, **__: Any) -> None:
        sent.append({path.name for path in Path(working_dir).iterdir()})

    monkeypatch.setattr(DLMSScheduler, "_upload_folder", upload)
    for module in ("diffusers.configuration_utils", "diffusers.utils.hub_utils"):
        monkeypatch.setattr(f"{module}.create_repo", lambda *_, **__: Repository(), raising=False)
    scheduler.save_pretrained(folder / "out", push_to_hub=True, repo_id="someone/solver")
    assert sent and sent[0] >= {"scheduler_config.json", "dlms_solver.safetensors"}


def test_solver_file_alone_and_the_rules_of_outputs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "three.safetensors"
    assert run(*command(folder, "--output", output, "--json")) == 0
    assert load_solver(output).nfe == 3
    scheduler = DLMSScheduler.from_config(
        load_pipeline(folder / "model").scheduler.config, solver=output
    )
    scheduler.set_timesteps(3)
    assert "exists" in complaint(capsys, *command(folder, "--output", output))
    (folder / "file").write_text("")
    assert "ends in .safetensors" in complaint(
        capsys, *command(folder, "--output", folder / "file")
    )


def test_mistakes_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--output", folder / "new")
    plain = ["distill", "--nfe", 3, *out]
    assert "--prompts needs --pipeline" in complaint(
        capsys, *plain, "--prompts", folder / "prompts.txt"
    )
    asked = [*plain, "--pipeline", folder / "model"]
    assert "needs --prompts FILE" in complaint(capsys, *asked)
    assert "is no file" in complaint(capsys, *asked, "--prompts", folder / "missing.txt")
    told = [*asked, "--prompts", folder / "prompts.txt"]
    assert "--call heigth" in complaint(capsys, *told, "--call=heigth=16")
    assert "dtype is 'float8'" in complaint(capsys, *told, "--dtype", "float8")
    assert "device 'cuda:99'" in complaint(capsys, *told, "--device", "cuda:99")
    assert "model_index.json" in complaint(
        capsys, *plain, "--pipeline", folder / "words", "--prompts", folder / "prompts.txt"
    )
    assert "not a directory" in complaint(
        capsys, *plain, "--pipeline", "/no/such/place", "--prompts", folder / "prompts.txt"
    )
    assert not (folder / "new").exists()  # an empty directory was left behind


def with_text(kind: str, folder: Path) -> Any:
    """SDXL, SD3 and FLUX with the text encoders they are published with."""

    def pair(number: str, parts: tuple[Any, Any]) -> dict[str, Any]:
        return {f"text_encoder{number}": parts[0], f"tokenizer{number}": parts[1]}

    if kind == "sdxl":
        first = pair("", tiny.clip(folder, 4))
        return tiny.sdxl(**first, **pair("_2", tiny.clip(folder, 4, 8)))
    if kind == "sd3":
        first = pair("", tiny.clip(folder, 8, 4))
        return tiny.sd3(**first, **pair("_2", tiny.clip(folder, 8, 4)), **pair("_3", tiny.t5()))
    return tiny.flux(
        use_dynamic_shifting=False, **pair("", tiny.clip(folder)), **pair("_2", tiny.t5())
    )


@pytest.mark.parametrize("kind", [slow("sdxl"), "sd3", "flux"])
def test_the_other_families(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Distilled from disk and run in the loaded pipeline; a second run encodes nothing anew."""
    with_text(kind, tmp_path / "words").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a cat\ndog\nthe sea\n")
    more = ["--call=max_sequence_length=12"] if kind != "sdxl" else []
    asked = [*command(tmp_path, "--output", tmp_path / "solver", "--json"), *more]
    assert run(*asked) == 0, capsys.readouterr().err
    facts = json.loads(capsys.readouterr().out)
    assert facts["best"]["score"] <= facts["initial"]
    pipe = load_pipeline(tmp_path / "model")
    pipe.scheduler = DLMSScheduler.from_pretrained(tmp_path / "solver")
    size = {"height": 16, "width": 16, "output_type": "latent", "num_inference_steps": 3}
    if kind != "sdxl":
        size["max_sequence_length"] = 12
    assert pipe.scheduler.solver.policy.designer.settings.afs == (kind == "sdxl")
    image = pipe("a cat", **size, generator=torch.Generator().manual_seed(0)).images
    assert bool(image.isfinite().all())
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "solver.cache").iterdir()}
    assert sorted(kept)[-1] == "prompts-00000.safetensors" and len(kept) == 2
    assert run(*asked, "--overwrite") == 0, capsys.readouterr().err
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "solver.cache").iterdir()}
    assert again == kept


def test_unconditional_pipeline_needs_no_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.unconditional("DDPM").save_pretrained(tmp_path / "model")
    asked = [
        "distill",
        "--pipeline",
        tmp_path / "model",
        "--nfe",
        2,
        "--trajectories",
        8,
        "--method",
        "dlms",
        *QUICK,
    ]
    told = [*asked, "--output", tmp_path / "solver"]
    (tmp_path / "prompts.txt").write_text("a cat")
    assert "takes no prompts" in complaint(capsys, *told, "--prompts", tmp_path / "prompts.txt")
    assert "takes no guidance" in complaint(capsys, *told, "--guidance-scale", 2)
    assert run(*told, "--json") == 0
    assert DLMSScheduler.from_pretrained(tmp_path / "solver").solver.nfe == 2


def test_embeddings_and_latents_are_found_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run encodes nothing; other prompts or guidance do not take the first one's files."""
    monkeypatch.setattr(calls, "GROUP", 2)
    encoded: list[int] = []
    capture = calls.capture

    def counted(recording: Any, arguments: dict[str, Any]) -> calls.StepCalls:
        encoded.append(len(arguments["prompt"]))
        return capture(recording, arguments)

    monkeypatch.setattr(calls, "capture", counted)
    pipe = load_pipeline(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}

    def output(prompts: list[str], scale: float = 2.5, store: Path | None = None) -> torch.Tensor:
        denoiser, shape = pipeline_denoiser(
            pipe, prompts, guidance_scale=scale, folder=store, **size
        )
        noise = torch.randn(len(PROMPTS), *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return denoiser(noise, denoiser.process.t_max)

    expected = output(PROMPTS)
    store = folder / "cache"
    encoded.clear()
    assert torch.equal(output(PROMPTS, store=store), expected) and encoded == [2, 2, 1]
    (store / "prompts-00001.safetensors").unlink()  # killed in the middle
    encoded.clear()
    assert torch.equal(output(PROMPTS, store=store), expected) and encoded == [2]
    encoded.clear()
    other = output(["a fish", *PROMPTS[1:]], store=store)
    assert encoded == [2] and not torch.equal(other, expected)
    encoded.clear()
    output(["a fish", *PROMPTS[1:]], scale=4.0, store=store)
    assert encoded == [2, 2, 1]
    (store / "prompts-00000.safetensors").write_bytes(b"damaged")
    encoded.clear()
    output(["a fish", *PROMPTS[1:]], scale=4.0, store=store)
    assert encoded == [2]


def test_groups_are_one_call_and_training_goes_through_all_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded in groups or at once is the same, and sample n of the training has prompt n mod P.

    In float64: a float32 network's batch of three may differ from three batches of one by 3e-5.
    """
    pipe = load_pipeline(folder / "model").to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "guidance_scale": 2.5}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)

    def answers(denoiser: Any) -> list[torch.Tensor]:
        found = []
        for number in range(len(PROMPTS)):
            denoiser.first_sample(number)
            with torch.no_grad():
                found.append(denoiser(noise, denoiser.process.t_max))
        return found

    whole = answers(pipeline_denoiser(pipe, PROMPTS, **size)[0])
    monkeypatch.setattr(calls, "GROUP", 2)
    denoiser, _ = pipeline_denoiser(pipe, PROMPTS, **size)
    for one, other in zip(whole, answers(denoiser), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(whole[0], whole[1])
    denoiser.first_sample(3)
    with torch.no_grad():
        both = denoiser(noise.expand(3, -1, -1, -1), denoiser.process.t_max)
    torch.testing.assert_close(both, torch.cat([whole[3], whole[4], whole[0]]))

    told: list[int] = []
    network = type(denoiser)
    tell = network.first_sample
    monkeypatch.setattr(network, "first_sample", lambda self, n: (told.append(n), tell(self, n)))
    assert run(*command(folder, "--output", folder / "solver", "--json")) == 0
    assert {4 * update for update in range(6)} <= set(told)


def test_exact_latents_are_kept(folder: Path) -> None:
    pipe = load_pipeline(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "guidance_scale": 2.5}
    noise = torch.randn(2, 4, 8, 8)
    solved: list[int] = []

    def solve() -> torch.Tensor:
        solved.append(1)
        return 2 * noise

    def kept(prompts: list[str], steps: int = 8) -> torch.Tensor:
        denoiser, _ = pipeline_denoiser(pipe, prompts, folder=folder / "cache", **size)
        return denoiser.kept_solution(noise, steps, solve)

    assert torch.equal(kept(PROMPTS), 2 * noise) and len(solved) == 1
    assert torch.equal(kept(PROMPTS), 2 * noise) and len(solved) == 1
    kept(PROMPTS, steps=9)
    kept(PROMPTS[::-1])
    assert len(solved) == 3
