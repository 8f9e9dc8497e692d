"""The graph passes, `compact_fx.passes`: list → choose → apply (rewrite → partition → expand)."""

if __name__ == "passes":
    raise ImportError(
        "import compact_fx.passes: a second copy of the passes would be a second truth"
    )
