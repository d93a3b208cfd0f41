"""guided-diffusion and consistency-model-repository checkpoints against an independent writing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from guided_reference import Reference, random_state, shapes
from safetensors.torch import load_file, save_file

from dlms_engine import grids, solvers
from dlms_engine.checkpoints import guided
from dlms_engine.checkpoints.guided_layout import build_settings, guided_settings, infer_settings
from dlms_engine.checkpoints.load import convert_checkpoint, load_checkpoint, load_network
from dlms_engine.checkpoints.networks import GuidedClassifier, GuidedUNet
from dlms_engine.checkpoints.restricted import UnsafeCheckpointError
from dlms_engine.cli import main
from dlms_engine.engine.sampler import Sampler

# the published 64x64 model's flags, narrower; a plain one; the consistency-model repository's
ADM: dict[str, Any] = {
    "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 2,
    "attention_resolutions": [2, 4], "channel_mult": [1, 2, 3], "num_classes": 5,
    "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
    "use_new_attention_order": True,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    **ADM, "out_channels": 3, "num_classes": None, "num_head_channels": -1, "num_heads": 4,
    "num_heads_upsample": 2, "use_scale_shift_norm": False, "resblock_updown": False,
    "use_new_attention_order": False, "num_res_blocks": 1, "channel_mult": [1, 2],
    "attention_resolutions": [2],
}  # fmt: skip
HALF = {
    **ADM, "model_channels": 64, "channel_mult": [0.5, 1], "attention_resolutions": [2],
    "use_new_attention_order": False,
}  # fmt: skip
SINGLE = {**PLAIN, "channel_mult": [1], "attention_resolutions": []}
EDM = {**ADM, "out_channels": 3, "attention_dims": 2}
UNETS = {"adm": ADM, "plain": PLAIN, "half": HALF, "single": SINGLE, "edm": EDM}
ATTENTION: dict[str, Any] = {
    "in_channels": 3, "model_channels": 32, "out_channels": 5, "num_res_blocks": 2,
    "attention_resolutions": [2, 4], "channel_mult": [1, 2, 2], "num_head_channels": 32,
    "use_scale_shift_norm": True, "resblock_updown": True, "use_new_attention_order": False,
    "pool": "attention", "image_size": 8,
}  # fmt: skip
ADAPTIVE = {**ATTENTION, "pool": "adaptive", "resblock_updown": False}
LATE = {**ATTENTION, "attention_resolutions": [4]}
CLASSIFIERS = {"attention": ATTENTION, "adaptive": ADAPTIVE, "late": LATE}
HEADS = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 801.5])
LABELS = torch.tensor([4, 1])


def heads(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: flags[name] for name in HEADS if name in flags}


def built(state: dict[str, torch.Tensor], **architecture: Any) -> torch.nn.Module:
    return build_settings(guided_settings(state, **architecture), state)


def told(flags: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return (LABELS,) if flags.get("num_classes") else ()


@pytest.mark.parametrize("case", UNETS)
def test_unet_has_the_published_tensors_and_maths(case: str) -> None:
    """Names and shapes, the architecture inferred from them, and the forward pass in float64."""
    flags = UNETS[case]
    state = random_state(flags)
    network = built(state, **heads(flags))
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == shapes(flags)
    inferred = infer_settings(state)
    assert inferred == {k: v for k, v in flags.items() if k in inferred} | {
        "attention_dims": flags.get("attention_dims", 1)
    }
    wide = {k: v.double() for k, v in state.items()}
    found = network.double()(X.double(), T.double(), *told(flags))
    expected = Reference(wide, flags).unet(X.double(), T.double(), *told(flags))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classifier_has_the_published_tensors_and_maths(case: str) -> None:
    flags = CLASSIFIERS[case]
    state = random_state(flags)
    network = built(state, num_head_channels=32)
    assert isinstance(network, GuidedClassifier)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == shapes(flags)
    wide = {k: v.double() for k, v in state.items()}
    found = network.double()(X.double(), T.double())
    expected = Reference(wide, flags).classifier(X.double(), T.double())
    assert found.shape == (2, 5)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "wrong", ["use_new_attention_order", "num_head_channels", "use_scale_shift_norm"]
)
def test_the_comparison_can_fail(wrong: str) -> None:
    """Attention order and heads change the answer, so the reference would show a mistake."""
    state = random_state(ADM)
    network = built(state, **heads(ADM))
    other = {**ADM, wrong: 32 if wrong == "num_head_channels" else not ADM[wrong]}
    if wrong == "use_scale_shift_norm":
        assert shapes(other) != shapes(ADM)
        return
    expected = Reference(state, other).unet(X, T, LABELS)
    assert (network(X, T, LABELS) - expected).abs().max() > 1e-3


def test_float32_and_half_precision_norms() -> None:
    """bfloat16 weights run, with group norms in float32, near the float32 network."""
    state = random_state(ADM)
    network = built(state, **heads(ADM))
    expected = network(X, T, LABELS)
    found = network.bfloat16()(X.bfloat16(), T, LABELS)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


# -- noise and guidance ---------------------------------------------------------------------------


def test_ddpm_schedules_are_the_published_ones() -> None:
    linear = guided.ddpm_betas("linear", 1000)
    assert float(linear[0]) == pytest.approx(1e-4) and float(linear[-1]) == pytest.approx(0.02)
    assert float(guided.ddpm_betas("linear", 4000)[-1]) == pytest.approx(0.005)
    cosine = guided.ddpm_betas("cosine", 1000)
    # improved-diffusion: 1 - f((i+1)/N) / f(i/N), f(t) = cos((t + 0.008) / 1.008 * pi / 2)^2
    import math

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    assert float(cosine[500]) == pytest.approx(1 - f(0.501) / f(0.5), rel=1e-12)
    assert float(cosine[-1]) == 0.999


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def test_noise_network_becomes_a_denoiser(tmp_path: Path) -> None:
    """E[x0 | x] = (x - sigma eps) / alpha, the variance half dropped, integer times at the knots."""
    state = random_state(ADM)
    denoiser = load_checkpoint(
        save(state, tmp_path / "adm.pt"), noise_schedule="cosine", **heads(ADM)
    )
    n = 700
    bar = torch.cumprod(1 - guided.ddpm_betas("cosine", 1000), 0)[n]
    t = (n + 1) / 1000
    eps = Reference(state, ADM).unet(X, torch.full((2,), float(n)), LABELS)[:, :3]
    expected = (X - (1 - bar).sqrt() * eps) / bar.sqrt()
    found = denoiser(X, t, class_labels=LABELS)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="class_labels is missing"):
        denoiser(X, t)
    table = solvers.dpm_solver_pp(denoiser.process, grids.logsnr(denoiser.process, 4), order=2)
    images = Sampler(denoiser, table).sample(seeds=range(2), shape=(3, 8, 8), class_labels=LABELS)
    assert bool(images.isfinite().all())


def test_edm_network_of_the_consistency_repository(tmp_path: Path) -> None:
    """Told 250 ln(sigma); c_skip, c_out and c_in of Karras et al. 2022; new attention order."""
    state = random_state(EDM)
    denoiser = load_checkpoint(save(state, tmp_path / "edm.pt"), num_head_channels=16)
    sigma = 1.7
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
    c_in = (sigma**2 + 0.25) ** -0.5
    time = torch.full((2,), 250 * torch.tensor(sigma, dtype=torch.float64).log()).float()
    expected = c_skip * X + c_out * Reference(state, EDM).unet(c_in * X, time, LABELS)
    torch.testing.assert_close(
        denoiser(X, sigma, class_labels=LABELS), expected, rtol=1e-4, atol=1e-4
    )


def guided_pair(tmp_path: Path, scale: float) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    state, noisy = random_state(ADM), random_state(ATTENTION, 1)
    denoiser = load_checkpoint(
        save(state, tmp_path / "adm.pt"),
        classifier=save(noisy, tmp_path / "classifier.pt") if scale else None,
        classifier_scale=scale,
        **heads(ADM),
    )
    return denoiser, state, noisy


def test_classifier_guidance_moves_the_noise_by_the_gradient(tmp_path: Path) -> None:
    """eps - sigma * scale * grad log p(y | x_t), the gradient by central differences in float64."""
    scale, n = 2.5, 400
    guide, state, noisy = guided_pair(tmp_path, scale)
    # 64 channels a head is the published classifiers' size; here all 64 are one head
    flags = {**ATTENTION, "num_head_channels": 64}
    reference = Reference({k: v.double() for k, v in noisy.items()}, flags)
    bar = torch.cumprod(1 - guided.ddpm_betas("linear", 1000), 0)[n]
    time = torch.full((2,), float(n), dtype=torch.float64)

    def log_p(x: torch.Tensor) -> torch.Tensor:
        return reference.classifier(x, time).log_softmax(1)[torch.arange(2), LABELS]

    gradient = torch.zeros_like(X, dtype=torch.float64).flatten(1)
    h = 1e-5
    for k in range(0, gradient.shape[1], 7):
        step = torch.zeros_like(gradient)
        step[:, k] = h
        step = step.reshape(X.shape)
        gradient[:, k] = (log_p(X.double() + step) - log_p(X.double() - step)) / (2 * h)
    eps = Reference(state, ADM).unet(X, time.float(), LABELS)[:, :3]
    t = torch.tensor((n + 1) / 1000, dtype=torch.float64)
    found = guide.predict(X, t, "noise", class_labels=LABELS)
    change = ((found - eps).double() / -(scale * (1 - bar).sqrt())).flatten(1)
    seen = slice(0, None, 7)
    torch.testing.assert_close(change[:, seen], gradient[:, seen], rtol=1e-2, atol=2e-5)
    assert gradient.abs().max() > 1e-3


def test_classifier_guidance_raises_the_class_and_survives_inference_mode(tmp_path: Path) -> None:
    guide, _, noisy = guided_pair(tmp_path, 30.0)
    plain, _, _ = guided_pair(tmp_path, 0.0)
    grid = grids.logsnr(plain.process, 5)

    def images(denoiser: Any) -> torch.Tensor:
        table = solvers.ddim(denoiser.process, grid)
        with torch.inference_mode():
            return Sampler(denoiser, table).sample(
                seeds=range(2), shape=(3, 8, 8), class_labels=LABELS
            )

    classifier = built(noisy)
    sure = [
        classifier(images(d).clone(), torch.zeros(2)).log_softmax(1)[torch.arange(2), LABELS].mean()
        for d in (plain, guide)
    ]
    assert sure[1] > sure[0] + 0.05
    with pytest.raises(ValueError, match="needs class_labels"):
        guide(X, 0.5)


def test_gradients_pass_through_the_guidance(tmp_path: Path) -> None:
    """Distillation differentiates the guided network, classifier included."""
    guide, _, _ = guided_pair(tmp_path, 3.0)
    plain, _, _ = guided_pair(tmp_path, 0.0)
    found = []
    for denoiser in (plain, guide):
        x = X.clone().requires_grad_(True)
        denoiser(x, 0.4, class_labels=LABELS).square().sum().backward()
        found.append(x.grad)
    assert found[1] is not None and bool(found[1].isfinite().all())
    assert not torch.allclose(found[0], found[1])


def test_denoisers_of_checkpoints_are_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their times were functions inside functions, which pickle refuses."""
    guide, _, _ = guided_pair(tmp_path, 2.0)
    wanted = guide(X, 0.4, class_labels=LABELS)
    again = pickle.loads(pickle.dumps(guide))
    assert torch.equal(again(X, 0.4, class_labels=LABELS), wanted)
    edm = save(random_state(EDM), tmp_path / "edm.pt")
    assert pickle.dumps(load_checkpoint(edm, **heads(EDM)))
    monkeypatch.setattr(guided.Noise, "time_input", lambda self, process: lambda t: t)
    with pytest.raises((AttributeError, pickle.PicklingError)):  # planted: a function inside one
        pickle.dumps(load_checkpoint(edm, **heads(EDM)))


# -- files ----------------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def test_dlms_convert_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted files answer as the originals, with no option left to give."""
    path = save({"state_dict": random_state(ADM)}, tmp_path / "adm.pt")  # nested, as trainers do
    out = tmp_path / "adm.safetensors"
    settings = ["--set=num_head_channels=16", "--set=use_new_attention_order=true"]
    main(["convert", str(path), str(out), *settings, "--set=noise_schedule=cosine", "--json"])
    assert json.loads(capsys.readouterr().out)["kind"] == "guided"
    first = load_checkpoint(path, noise_schedule="cosine", **heads(ADM))
    again = load_checkpoint(out)
    asked = {"class_labels": LABELS}
    assert torch.equal(first(X, 0.3, **asked), again(X, 0.3, **asked))
    assert again.process.config() == first.process.config()
    classifier = save(random_state(ATTENTION), tmp_path / "classifier.pt")
    main(["convert", str(classifier), str(tmp_path / "classifier.safetensors")])
    network, noise = load_network(tmp_path / "classifier.safetensors")
    assert isinstance(network, GuidedClassifier) and noise is None
    guide = load_checkpoint(out, classifier=tmp_path / "classifier.safetensors")
    assert bool(guide(X, 0.3, **asked).isfinite().all())
    assert "exists" in complaint(capsys, "convert", path, out, *settings)
    assert "converted already" in complaint(capsys, "convert", out, tmp_path / "b.safetensors")


def test_pickled_code_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """A whole module saved by torch.save, and a plain pickle of something else, are not loaded."""
    network = GuidedUNet(**{k: v for k, v in SINGLE.items() if k != "num_classes"})
    torch.save(network, tmp_path / "module.pt")
    with pytest.raises(UnsafeCheckpointError, match="environment of its own"):
        load_checkpoint(tmp_path / "module.pt", num_heads=4)

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("executed",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UnsafeCheckpointError, match="weights_only=False"):
        load_checkpoint(tmp_path / "evil.pt", num_heads=4)
    with pytest.raises(UnsafeCheckpointError, match="refused"):
        convert_checkpoint(tmp_path / "evil.pt", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_holds_itself_is_no_checkpoint(tmp_path: Path) -> None:
    """It ended in a RecursionError."""
    held: dict[str, Any] = {}
    held["model"] = held
    torch.save(held, tmp_path / "ring.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors"):
        load_checkpoint(tmp_path / "ring.pt")
    torch.save({"model": {"ema": random_state(PLAIN)}}, tmp_path / "nested.pt")
    assert load_checkpoint(tmp_path / "nested.pt", **heads(PLAIN)).process.name == "vp_discrete"


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = save(random_state(ADM), tmp_path / "adm.pt")
    with pytest.raises(ValueError, match="num_heads or num_head_channels"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="unknown option 'nois_schedule'"):
        load_checkpoint(path, nois_schedule="cosine")
    with pytest.raises(ValueError, match="noise_schedule is 'sqrt'"):
        load_checkpoint(path, num_heads=4, noise_schedule="sqrt")
    with pytest.raises(ValueError, match="no multiple of num_head_channels=48"):
        load_checkpoint(path, num_head_channels=48)
    state = random_state(ADM)
    del state["output_blocks.0.0.in_layers.2.bias"]
    with pytest.raises(ValueError, match="do not fit GuidedUNet"):
        load_checkpoint(save(state, tmp_path / "cut.pt"), num_head_channels=16)
    with pytest.raises(ValueError, match="not the weights of"):
        load_checkpoint(save({"a": X}, tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="expected a state dict"):
        load_checkpoint(save({"a": 1}, tmp_path / "number.pt"))
    classifier = save(random_state(ATTENTION), tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match="is a classifier"):
        load_checkpoint(classifier)
    edm = save(random_state(EDM), tmp_path / "edm.pt")
    with pytest.raises(ValueError, match="guidance is for ddpm"):
        load_checkpoint(edm, num_head_channels=16, classifier=classifier)
    with pytest.raises(ValueError, match="must end in .safetensors"):
        convert_checkpoint(path, tmp_path / "out.pt")


def test_other_versions_are_refused_by_name(tmp_path: Path) -> None:
    path = save(random_state(ADM), tmp_path / "adm.pt")
    out = convert_checkpoint(path, tmp_path / "adm.safetensors", num_head_channels=16)
    held = load_file(out)
    later = {"format": "dlms_engine.guided/2", "written_by": "9.1.0", "checkpoint": "{}"}
    save_file(held, tmp_path / "later.safetensors", later)
    with pytest.raises(
        ValueError, match=r"guided/2.*9\.1\.0.*convert the original checkpoint again"
    ):
        load_checkpoint(tmp_path / "later.safetensors")
