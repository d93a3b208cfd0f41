"""Every place where the host may read from the device, and why; nothing else may."""

ALLOWED = {
    "support.transfer.host_numbers": "what an optimiser step logs, or a score: all at once",
    "support.transfer.rows_down": "the gradient of a table's rows, one tensor an update",
    "support.transfer.to_host": "finished results, for a report, a table or a file",
    "learners.training.checkpoint.save_checkpoint": "a checkpoint",
    "learners.training.identity._bytes": "what a checkpoint belongs to, where one is kept",
    "lab.comparison.store.digest": "what a measurement that is kept belongs to",
    "integrations.pipelines.recording.Recorder.step": "a pipeline's first call of a kind, once",
    "integrations.pipelines.dry_run.DryRun.weights": "all of one call's mixing weights at once",
    "policies.dlms.DesignerPolicy.state": "a solver file",
    "policies.amed.AmedPolicy.state": "a solver file",
    "lab.evaluation.frechet.FrechetDistance.update": "refuses samples that are not finite",
    "lab.evaluation.frechet.FrechetDistance.sums": "finished sums",
}
SAMPLING: dict[str, str] = {}
"""A run reads nothing."""
