"""How long each chapter takes: what it does, times how fast this machine does it (`speed_probe`).

Operations that grow with the run are counted from its sizes. What else a chapter does is a number
of seconds and of model passes that was read off runs of `demo` and of a rehearsal of `paper` on two
cores; there the sums were within a factor of two of the truth.
"""

import os
from typing import TYPE_CHECKING

from scfm_circuits.book.run_sizes import RunSizes
from scfm_circuits.transcoders.variants import settings, variant_profile

if TYPE_CHECKING:
    from scfm_circuits.book.speed_probe import Speeds
    from scfm_circuits.common.profile import Profile

CELLS_PER_SECOND = 5000
"""Cells read, ranked, tokenized and stored (`make bench BENCH=atlas`, two cores)."""
STARTED = 12.0
"""Seconds until a chapter's process has its libraries, and to draw and write its figures."""
LIVE = 800
"""Live features of a layer, as in the paper's Table 4 and in `demo`."""
NULL_SECONDS = 0.02
"""Seconds for a feature's thousand null lists of each kind on two cores, in `demo`."""
ROW = 0.07
"""A row of the whole graph, in passes of one prompt."""
AVERAGED, TRACED, RUNS = 100, 30, 20
"""Chapter 08: training cells averaged over, held-out cells at most, and runs for each of these."""
ASKED, COMPARED = 500, 32
"""Held-out cells, at most, that chapter 01 asks for their type, and that chapter 09 measures on."""


def chapter_seconds(profile: "Profile", sizes: RunSizes, speeds: "Speeds") -> dict[str, float]:
    """Seconds of every chapter, by its notebook's name, from nothing."""
    layers, width = sizes.layers, profile.expansion * sizes.width
    tokens, held_out = sizes.tokens, sizes.held_out_tokens

    def passed(n: float) -> float:
        """n tokens through the model."""
        return n * layers * speeds.forward

    # One pass over all cells that counts what features fire on.
    counted = passed(tokens) + tokens * layers * speeds.counting
    held_out_share = held_out / max(tokens, 1)
    live = layers * min(width, LIVE)
    nulls = live * NULL_SECONDS * profile.null_draws / 1000 * 2 / (os.cpu_count() or 2)

    def trained(run: "Profile") -> float:
        steps = max(1, run.training_tokens // run.batch_tokens)
        kept = sizes.training_tokens <= run.buffer_tokens  # then the model runs once
        return (steps * run.batch_tokens * layers * speeds.training
                + passed(sizes.training_tokens if kept else run.training_tokens))

    small = 0.0
    if profile.model == "train":
        seen = profile.model_steps * profile.model_batch_cells * sizes.length
        small = 3 * (passed(seen) + seen * speeds.unembedding)
    variants, each = len(settings(profile)), variant_profile(profile, {})
    control = trained(profile) + counted if profile.reinitialised_control else 0.0
    # All layers replaced or removed, each alone, and the untouched model; an estimate's two
    # products are about as much as counting.
    validated = (passed(held_out * (4 + layers)) + held_out * (3 + 2 * layers) * speeds.unembedding
                 + 3 * held_out * layers * speeds.counting)
    asked = min(ASKED, sizes.held_out) * 2 * sizes.length
    few = min(COMPARED, sizes.held_out) * sizes.length
    compared = (1 + variants) * (passed(few * (2 + layers / 2))
                                 + few * (2 + layers) * speeds.unembedding)
    own = {
        "01_cells_and_model": sizes.cells / CELLS_PER_SECOND + small + passed(asked),
        "02_training": trained(profile),
        "03_validation": validated,
        "04_sparsity": counted,
        # The untrained encoder's features, and both dictionaries' on held-out cells alone.
        "05_human_evaluation": counted * (1 + 2 * held_out_share),
        "06_enrichment": control + nulls,
        "07_endothelial_case_study": profile.graph_features * ROW * passed(sizes.length),
        "08_controls": passed(sizes.length) * (
            min(AVERAGED, sizes.cells) + RUNS * min(TRACED, sizes.held_out)),
        "09_variants": variants * (trained(each) + counted) + compared,
        "10_features": 0.0,
        "11_claims": 0.0,
    }
    return {name: STARTED + seconds for name, seconds in own.items()}
