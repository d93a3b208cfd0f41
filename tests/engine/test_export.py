"""A sampler as a package: the trace has the sampler's bits, the package runs without the library."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil

import pytest
import torch
from cli_model import TinyNetwork
from marks import slow
from package_alone import run_alone
from torch import Tensor, nn
from torch._inductor import metrics

from dlms_engine import grids, processes, solvers
from dlms_engine.engine.export import (
    METADATA,
    SamplerExportError,
    bounds,
    export_sampler,
    split_conditions,
    trace_sampler,
)
from dlms_engine.engine.sampler import Sampler, seeded_noise
from dlms_engine.models.denoiser import Denoiser
from dlms_engine.policies.amed import AmedPolicy
from dlms_engine.policies.amed_formulas import AmedBase
from dlms_engine.policies.amed_predictor import AmedPredictor
from dlms_engine.policies.dlms import Designer, DesignerPolicy, DesignerSettings

EDM = processes.EDM()
GRID = grids.polynomial(EDM, 4)
SHAPE = (3, 8, 8)
HAVE_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))


class Labelled(TinyNetwork):
    """The tiny network with a class and a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor, more, gain: float) -> Tensor:
        shift = self.classes(label)[:, :, None, None] + more["shift"].mean()
        return super().forward(x, c_noise) + gain * shift.to(x.dtype)


def denoiser(kind: type[nn.Module] = TinyNetwork, dtype=torch.float32, **options) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind().eval().requires_grad_(False).to(dtype)
    return Denoiser(network, EDM, "edm", features="mid_block", **options)


def designer_policy(prediction: str) -> DesignerPolicy:
    """A designer whose rows differ from sample to sample."""
    weights = torch.tensor([[1.0, 0, 0], [1.5, -0.5, 0], [1.5, -0.5, 0], [1.5, -0.5, 0]])
    designer = Designer(
        DesignerSettings(4, 3, True, prediction, features=64), EDM, GRID, weights.double()
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.init.normal_(designer.head.weight, std=0.1)
    return DesignerPolicy(designer)


def amed_policy(base: AmedBase) -> AmedPolicy:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        predictor = AmedPredictor(64, scale_dir=0.01, scale_time=0.2)
    return AmedPolicy(predictor, base, EDM, GRID[::2].clone())


def noise(batch: int, first: int = 0) -> Tensor:
    return seeded_noise(range(first, first + batch), SHAPE, 80.0)


def labelled(batch: int) -> dict[str, object]:
    return {"label": torch.arange(batch) % 4, "more": {"shift": torch.ones(batch)}, "gain": 0.3}


def arguments(x: Tensor, cond: dict[str, object]) -> tuple:
    """What a package is called with."""
    tensors = split_conditions(cond)[0]
    return (x, tensors) if tensors else (x,)


GUIDED = {"guidance_scale": 2.5, "unconditional": {"label": torch.zeros(1, dtype=torch.long)}}
CASES = {
    "table": lambda: (denoiser(), solvers.ipndm(EDM, GRID, order=4, afs=True), {}),
    "two rows a step": lambda: (denoiser(), solvers.heun(EDM, GRID[::2].clone()), {}),
    "half precision": lambda: (denoiser(dtype=torch.bfloat16), solvers.unipc(EDM, GRID), {}),
    "guided": lambda: (denoiser(Labelled, **GUIDED), solvers.deis(EDM, GRID), labelled),
    "clipped": lambda: (denoiser(dynamic_thresholding=0.9), solvers.ddim(EDM, GRID), {}),
    "dlms": lambda: (denoiser(), designer_policy("data"), {}),
    "dlms noise": lambda: (denoiser(), designer_policy("noise"), {}),
    "dlms guided": lambda: (denoiser(Labelled, **GUIDED), designer_policy("data"), labelled),
    "amed": lambda: (denoiser(), amed_policy(AmedBase("amed", afs=True)), {}),
    "amed plugin": lambda: (denoiser(), amed_policy(AmedBase("ipndm")), {}),
}


def make(name: str):
    """(sampler on the eager backend, arguments of the network for a batch)."""
    held, policy, cond = CASES[name]()
    return Sampler(held, policy, backend="eager"), cond or (lambda batch: {})


@pytest.mark.parametrize("name", CASES)
def test_the_traced_sampler_has_the_samplers_bits_in_any_batch(name):
    sampler, cond = make(name)
    program = trace_sampler(sampler, noise(3), conditions=cond(3))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not [
        t for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace != "aten"
    ]
    run = program.module()
    for batch in (1, 3, 6):
        x, given = noise(batch, first=10), cond(batch)
        assert torch.equal(run(*arguments(x, given)), sampler(x, **given)), batch


def test_rows_of_their_own_for_every_sample():
    table = solvers.ddim(EDM, torch.stack([GRID, grids.logsnr(EDM, 4)]))
    sampler = Sampler(denoiser(), table, backend="eager")
    with pytest.raises(ValueError, match="dynamic_batch=False"):
        trace_sampler(sampler, noise(2))
    run = trace_sampler(sampler, noise(2), dynamic_batch=False).module()
    assert torch.equal(run(noise(2)), sampler(noise(2)))


def test_weights_of_zero_are_left_out_of_the_graph():
    """A table says beforehand what it reads: first-order rows touch no history."""
    grid = grids.polynomial(EDM, 4)

    def products(table) -> int:
        nodes = trace_sampler(Sampler(denoiser(), table), noise(2)).graph.nodes
        return sum(node.target is torch.ops.aten.where.self for node in nodes)

    assert products(solvers.ddim(EDM, grid)) == 4
    assert products(solvers.ipndm(EDM, grid, order=3)) == 1 + 2 + 3 + 3


class Product(nn.Module):
    """One matrix product, which Inductor hands to a library: what is left around it are the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False).requires_grad_(False)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.slow
@pytest.mark.skipif(not HAVE_COMPILER, reason="Inductor needs a C++ compiler")
def test_inductor_makes_one_loop_of_each_row():
    table = solvers.ipndm(EDM, GRID, order=3)
    sampler = Sampler(Denoiser(Product(), EDM, "edm"), table, backend="eager")
    x = seeded_noise(range(3), (64,), 80.0)
    module = trace_sampler(sampler, x, dynamic_batch=False).module()
    torch._dynamo.reset()
    metrics.reset()
    torch.compile(module, fullgraph=True)(x)
    assert metrics.generated_kernel_count == 1 + table.nfe  # the first network input, and the rows


def test_the_sampler_is_as_it_was_afterwards():
    sampler, _ = make("dlms")
    before = sampler(noise(2))
    trace_sampler(sampler, noise(2))
    with pytest.raises(RuntimeError, match="no bottleneck"):  # no tensor of the trace is left
        _ = sampler.denoiser.bottleneck
    assert torch.equal(sampler(noise(2)), before)


class Reads(TinyNetwork):
    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return super().forward(x, c_noise) if c_noise.max() > 0 else x


class Fixed(TinyNetwork):
    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return super().forward(x, c_noise).reshape(3, *SHAPE)


class Fails(TinyNetwork):
    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        raise OSError("no such weights")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Reads, "depends on a tensor's value .*torch.where"),
        (Fixed, "fixes the batch size .*dynamic_batch=False"),
        (Fails, "it failed with OSError: no such weights"),
    ],
)
def test_networks_that_cannot_be_exported_are_told_why(network, reason):
    sampler = Sampler(denoiser(network), solvers.ddim(EDM, GRID))
    with pytest.raises(SamplerExportError, match=f"cannot be exported: .*{reason}"):
        trace_sampler(sampler, noise(3))


class Splits(TinyNetwork):
    """As U-Nets do that copy large batches."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return super().forward(x.clone() if x.shape[0] >= 64 else x, c_noise)


def test_a_network_that_treats_large_batches_otherwise_bounds_the_batch():
    sampler = Sampler(denoiser(Splits), solvers.ddim(EDM, GRID), backend="eager")
    assert bounds(trace_sampler(sampler, noise(3)), noise(3)) == (1, 63)
    with pytest.raises(SamplerExportError, match="more than 63 samples: pass max_batch=63"):
        trace_sampler(sampler, noise(3), max_batch=64)


def test_a_network_of_one_batch_can_be_exported_for_it():
    sampler = Sampler(denoiser(Fixed), solvers.ddim(EDM, GRID), backend="eager")
    run = trace_sampler(sampler, noise(3), dynamic_batch=False).module()
    assert torch.equal(run(noise(3)), sampler(noise(3)))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (noise(1), {}, r"batch 1 and max_batch is 4096.*dynamic_batch=False"),
        (noise(3), {"max_batch": 2}, "batch 3 and max_batch is 2"),
        (torch.zeros(0, *SHAPE), {}, r"noise is torch.float32 \(0, 3, 8, 8\)"),
        (torch.zeros(2, *SHAPE, dtype=torch.int32), {}, "noise is torch.int32"),
    ],
)
def test_what_does_not_fit_is_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        trace_sampler(make("table")[0], x, **options)


def test_other_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sampler\.zip, expected a name that ends in \.pt2"):
        export_sampler(make("table")[0], noise(2), tmp_path / "sampler.zip")


compiler = pytest.mark.skipif(not HAVE_COMPILER, reason="AOTInductor needs a C++ compiler")


def assert_no_worse_than_eager(got: Tensor, sampler: Sampler, x: Tensor, cond: dict) -> None:
    """Error against float64 at most twice the eager sampler's, or one rounding of the largest value.

    The rows do the same operations in the same order, but Inductor has its own tanh and its own
    order of sums in a convolution: the bits may differ where the accuracy may not.
    """
    wide = Sampler(copy.deepcopy(sampler.denoiser).double(), sampler.policy, dtype=torch.float64)
    truth = wide(x, **cond)
    yard = (sampler(x, **cond).double() - truth).abs().max().item()
    ulp = torch.finfo(torch.float32).eps * truth.abs().max().item()
    error = (got.double() - truth).abs().max().item()
    assert error <= 2 * max(yard, ulp), f"{error:.3e} > 2 x max({yard:.3e}, {ulp:.3e})"


@compiler
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's, while it packages
@pytest.mark.parametrize("name", ["guided", slow("dlms")])
def test_the_package_runs_without_the_library(tmp_path, name):
    sampler, cond = make(name)
    said = {"cond": cond(3)} if name == "guided" else {"conditions": cond(3)}  # the earlier name
    path = export_sampler(sampler, noise(3), tmp_path / "sampler.pt2", max_batch=64, **said)
    batches = [(noise(batch, first=20), cond(batch)) for batch in (1, 3, 7)]
    outputs, metadata = run_alone(path.parent, [arguments(x, c) for x, c in batches])
    for got, (x, c) in zip(outputs, batches, strict=True):
        assert_no_worse_than_eager(got, sampler, x, c)
    # planted: the bound sees another solver
    other = Sampler(sampler.denoiser, solvers.ddim(EDM, GRID), backend="eager")
    with pytest.raises(AssertionError, match="2 x max"):
        assert_no_worse_than_eager(outputs[-1], other, *batches[-1])
    held = json.loads(metadata[METADATA])
    assert held["nfe"] == sampler.nfe and held["noise"]["batch"] == [1, 64]
    assert (
        held["cond"] == (["label", "more"] if name == "guided" else [])
        and held["sigma_start"] == 80.0
    )


@compiler
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_without_a_compiler_the_reason_is_given(tmp_path):
    from torch._inductor import config

    absent = config.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)})
    with absent, pytest.raises(SamplerExportError, match=r"needs a working C\+\+ compiler"):
        export_sampler(make("table")[0], noise(2), tmp_path / "sampler.pt2")


def packaged(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A compiler that gives ``size`` bytes at once."""

    def package(_program: object, *, package_path: io.BytesIO, **_options: object) -> None:
        package_path.write(b"p" * size)

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_full_disk_leaves_the_old_package(tmp_path, monkeypatch):
    """torch's own writer aborted the process there, with the old package gone."""
    import resource

    path = tmp_path / "sampler.pt2"
    path.write_bytes(b"old")
    packaged(monkeypatch, 1 << 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # a write past it is refused
    try:
        with pytest.raises(
            OSError, match="could not write .*what was there before is untouched"
        ) as e:
            export_sampler(make("table")[0], noise(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_is_found_before_the_trace(tmp_path, monkeypatch):
    def trace(*_given: object, **_named: object) -> None:
        raise AssertionError("traced")

    monkeypatch.setattr("dlms_engine.engine.export.trace_sampler", trace)
    with pytest.raises(OSError, match="No such file or directory"):
        export_sampler(make("table")[0], noise(2), tmp_path / "absent" / "sampler.pt2")
    path = tmp_path / "sampler.pt2"
    path.touch()
    with pytest.raises(FileExistsError, match=r"sampler\.pt2 exists: pass overwrite=True"):
        export_sampler(make("table")[0], noise(2), path, overwrite=False)


@pytest.mark.parametrize(
    "name",
    [
        "amed",
        *(slow(name) for name in ("dlms", "dlms guided", "amed plugin")),
    ],
)
def test_policies_compile_to_one_graph_with_the_samplers_bits(name):
    """Traced by Dynamo, which sees Python where torch.export runs it; tables: test_sampler.py."""
    torch._dynamo.reset()
    sampler, cond = make(name)
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    x, given = noise(3), cond(3)
    assert torch.equal(compiled(x, **given), sampler(x, **given))
