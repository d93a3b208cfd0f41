"""Files, ranks and versions: what has nothing to do with sampling."""
