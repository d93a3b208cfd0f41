"""What ``acceleration.report()`` says: each kind of call, how it runs and why."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class KindReport:
    """One kind of arguments.

    Attributes:
        arguments: in short: the numbers by value, the rest by form.
        whole_loop: the engine runs the loop; otherwise the pipeline does, step by step.
        reason: why step by step; empty for the whole loop.
        calls_per_step: network calls of each step of the recorded run.
        runs: how many calls of this kind there were.
        seconds: of the newest call ``{"step by step": s, "whole loop": s}``, the pipeline's other
            work included.
    """

    arguments: str
    whole_loop: bool = False
    reason: str = "not yet run"
    calls_per_step: list[int] = field(default_factory=list)
    runs: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        how = "whole loop" if self.whole_loop else f"step by step: {self.reason}"
        calls = sorted(set(self.calls_per_step))
        lines = [f"  {how}", f"    runs {self.runs}, network calls per step {calls or '-'}"]
        if len(self.seconds) == 2:
            slow, fast = self.seconds["step by step"], self.seconds["whole loop"]
            lines.append(f"    {slow:.3g} s recorded step by step, {fast:.3g} s whole loop")
        lines.append(f"    {self.arguments}")
        return "\n".join(lines)


@dataclass
class AccelerationReport:
    """How an accelerated pipeline runs, kind by kind; ``str`` says it in words.

    Attributes:
        captures: CUDA graphs kept now; 0 on a CPU, where the loop is not captured.
        refused: why the pipeline keeps its own scheduler; empty where it does not.
    """

    pipeline: str
    solver: str
    kinds: list[KindReport]
    captures: int
    refused: str = ""

    @property
    def whole_loop(self) -> bool:
        """Whether the newest kind runs in the engine's loop."""
        return bool(self.kinds) and self.kinds[-1].whole_loop

    @property
    def reason(self) -> str:
        """Why the newest kind runs step by step; empty for the whole loop."""
        return self.kinds[-1].reason if self.kinds else "not yet run"

    def __str__(self) -> str:
        head = f"{self.pipeline} with {self.solver}: {len(self.kinds)} kinds of calls, "
        head += f"{self.captures} CUDA graphs"
        kept = [f"  its own scheduler runs: {self.refused}"] if self.refused else []
        return "\n".join([head, *kept, *map(str, self.kinds)])

    __repr__ = __str__
