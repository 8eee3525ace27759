"""Simulated heart cells with known gene programs, so that what should be found is known.

`data/planted/programs.yml` says which genes a cell type's program holds, which programs several
types share, and which are on in some cells of any type. From these the counts are drawn:

1. every gene has a level of its own within its group; a program's genes are nearly silent where the
   program is off, and rise with the cell's own activity of the program where it is on;
2. a tenth of a cell's RNA, more or less, is ambient, the average of all cells: markers are seen in
   other types, too;
3. counts are negative binomial around the cell's share of its library, whose size varies.

Everything follows from the profile's seed.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from scfm_circuits import InputError
from scfm_circuits.common.files import first_line
from scfm_circuits.common.profile import PLANTED_CELLS, PLANTED_PROGRAMS, ROOT, Profile, cells_path
from scfm_circuits.common.randomness import generator

if TYPE_CHECKING:
    from anndata import AnnData

    from scfm_circuits.cells.reading import RankedCells

PROGRAMS = ROOT / PLANTED_PROGRAMS
N_CELLS = 1500
ON_LEVEL = 6.0
"""Median relative expression of a program's genes where it is on (the background's levels are in
the file, in the same unit)."""
OFF_LEVEL = 0.3
"""The same where the program is off."""
GENE_SPREAD = 0.9
"""Standard deviation of a gene's log level within its group. A program's genes stand in the file
from the most to the least expressed; the background's levels have no order."""
ACTIVITY_SPREAD = 0.5
"""Standard deviation of a program's log activity between the cells in which it is on."""
LIBRARY_MEDIAN, LIBRARY_SPREAD = 3000, 0.5
"""Counts of a cell: median, and standard deviation of their logarithm."""
AMBIENT = (2.0, 18.0)
"""Beta distribution of the share of a cell's RNA that is ambient."""
DISPERSION = 0.5
"""Of a count with mean m the variance is m + 0.5 m^2."""


@dataclass(frozen=True)
class Program:
    """A set of genes that are expressed together.

    cell_types: those in which it is on; empty for a state. share: of a state, the share of the
    cells of every type in which it is on; otherwise 1.
    """

    name: str
    genes: tuple[str, ...]
    cell_types: tuple[str, ...]
    share: float

    @property
    def kind(self) -> str:
        """`own`: planted for one cell type; `shared`: by several; `state`: in any."""
        if not self.cell_types:
            return "state"
        return "own" if len(self.cell_types) == 1 else "shared"


@dataclass(frozen=True)
class Plan:
    """What is planted: cell types with their shares, programs, and background groups.

    background: name of the group to its level and genes. No gene stands in two places.
    """

    cell_types: Mapping[str, float]
    programs: tuple[Program, ...]
    background: Mapping[str, tuple[float, tuple[str, ...]]]

    @property
    def genes(self) -> tuple[str, ...]:
        """All genes, the programs' first."""
        planted = [gene for program in self.programs for gene in program.genes]
        return (*planted, *(gene for _, genes in self.background.values() for gene in genes))

    def role(self, gene: str, cell_type: str) -> str:
        """What a gene is to a cell type: `own`, `shared` (with another), `other` (planted for other
        types only), `state` or `background`."""
        for program in self.programs:
            if gene in program.genes:
                if program.kind == "state" or cell_type in program.cell_types:
                    return program.kind
                return "other"
        return "background"


def read_plan(path: Path = PROGRAMS) -> Plan:
    """Read and check a file of programs.

    Raises:
        InputError: the file cannot be read or lacks something, a gene stands in it twice, a program
            names an unknown cell type, or shares of the cell types do not add up to 1.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        plan = _plan(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The planted programs {path} cannot be read "
                         f"({first_line(error)}).") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"The planted programs {path} lack something or have it in the wrong form "
                         f"({error}); see the comment at the head of data/planted/programs.yml."
                         ) from None
    _check(plan, path)
    return plan


def _plan(content: Any) -> Plan:
    programs = tuple(
        Program(name, tuple(map(str, entry["genes"])), tuple(entry.get("cell_types", ())),
                float(entry.get("share", 1)))
        for name, entry in content["programs"].items())
    background = {name: (float(entry["level"]), tuple(map(str, entry["genes"])))
                  for name, entry in content["background"].items()}
    shares = {str(name): float(share) for name, share in content["cell_types"].items()}
    return Plan(shares, programs, background)


def _check(plan: Plan, path: Path) -> None:
    twice = [gene for gene, n in Counter(plan.genes).items() if n > 1]
    if twice:
        raise InputError(f"The planted programs {path} have {min(twice)} twice; a gene can be "
                         "planted in one place only.")
    for program in plan.programs:
        unknown = set(program.cell_types) - set(plan.cell_types)
        if unknown:
            raise InputError(f"The planted program {program.name!r} of {path} is on in "
                             f"{min(unknown)!r}, which is no cell type of that file.")
        if not 0 < program.share <= 1:
            raise InputError(f"The planted program {program.name!r} of {path} has a share of "
                             f"{program.share:g}; it must be above 0 and at most 1.")
    if abs(sum(plan.cell_types.values()) - 1) > 1e-6 or min(plan.cell_types.values()) <= 0:
        raise InputError(f"The shares of the cell types of {path} must be positive and add up to "
                         "1.")


def planted_cells(seed: int, n_cells: int = N_CELLS, plan: Plan | None = None) -> "AnnData":
    """Counts of simulated cells: X (n_cells, n_genes), `cell_type` in obs, symbols in var's index.

    For each program `activity_<name>` in obs is what the cell's expression of it was multiplied
    with, 0 where it was off.
    """
    import scipy.sparse as sp
    from anndata import AnnData

    plan = plan or read_plan()
    rng = generator(seed, "simulated cells")
    names = list(plan.cell_types)
    types = rng.choice(len(names), n_cells, p=list(plan.cell_types.values()))
    activity = _activities(plan, types, rng)
    shares = _expected_shares(plan, activity, rng)
    library = rng.lognormal(np.log(LIBRARY_MEDIAN), LIBRARY_SPREAD, (n_cells, 1))
    mean = rng.gamma(1 / DISPERSION, DISPERSION * shares * library)
    observations = pd.DataFrame(
        {"cell_type": np.array(names)[types],
         **{f"activity_{program.name}": activity[:, i]
            for i, program in enumerate(plan.programs)}},
        index=[f"simulated_{i:04d}" for i in range(n_cells)])
    return AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)), obs=observations,
                   var=pd.DataFrame(index=list(plan.genes)))


def _activities(plan: Plan, types: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n_cells, n_programs) activity of each program: 0 where it is off, around 1 where on."""
    names = np.array(list(plan.cell_types))
    on = np.empty((len(types), len(plan.programs)), bool)
    for i, program in enumerate(plan.programs):
        in_types = np.isin(names[types], program.cell_types) if program.cell_types else True
        on[:, i] = in_types & (rng.random(len(types)) < program.share)
    return np.where(on, rng.lognormal(0, ACTIVITY_SPREAD, on.shape), 0.0)


def _expected_shares(plan: Plan, activity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n_cells, n_genes) expected share of each gene among a cell's RNA; rows sum to 1."""
    n_genes = len(plan.genes)
    level = np.repeat(
        [ON_LEVEL] * len(plan.programs) + [level for level, _ in plan.background.values()],
        [len(program.genes) for program in plan.programs]
        + [len(genes) for _, genes in plan.background.values()])
    own = rng.lognormal(0, GENE_SPREAD, n_genes)
    factor = np.ones((len(activity), n_genes))
    start = 0
    for i, program in enumerate(plan.programs):
        end = start + len(program.genes)
        own[start:end] = np.sort(own[start:end])[::-1]
        factor[:, start:end] = activity[:, [i]] + OFF_LEVEL / ON_LEVEL
        start = end
    level = level * own
    shares = level * factor
    shares /= shares.sum(axis=1, keepdims=True)
    ambient = rng.beta(*AMBIENT, (len(activity), 1))
    return (1 - ambient) * shares + ambient * shares.mean(axis=0)


def plan_of(profile: Profile) -> Plan:
    """What is planted in the profile's cells.

    Raises:
        InputError: the profile's cells are others, whose truth is not known.
    """
    path = cells_path(profile)
    if profile.cells != PLANTED_CELLS or path is None:
        raise InputError(f"The truth about the cells {profile.cells!r} is not known; it is for "
                         f"`cells: {PLANTED_CELLS}` only.")
    return read_plan(path)


# --- a harder truth ------------------------------------------------------------------------------

FOLD = 2.5
"""How many times a program's genes rise where it is on, in `logic_cells`."""
LOGIC_PROGRAMS = ("A", "B", "C", "D")
"""Programs that are on in half of the cells each, independently."""
PROGRAM_GENES, LOGIC_GENES = 10, 240
"""Genes of one program, and all genes but the pair whose order tells."""
LOGIC_LIBRARY, LOGIC_DISPERSION = 3000, 0.2
PAIR_LEVEL = 8.0
"""Median level of the pair's genes, where all others' median is 1."""
TYPES = ("alpha", "beta", "gamma", "delta")
"""Cell types of `logic_cells`: neither of two truths, the first, the second, both."""
MARKERS, CONJUNCTIONS, ORDER = "a program is on", "two programs are on", "order of two genes"


class LogicCells(NamedTuple):
    """Cells whose truths are logic, not markers: see `logic_cells`.

    truths: (n_cells,) bool by kind (`MARKERS`, `CONJUNCTIONS`, `ORDER`) and name.
    """

    cells: "RankedCells"
    truths: dict[tuple[str, str], np.ndarray]


def logic_cells(seed: int, n_cells: int, genes_per_cell: int) -> LogicCells:
    """Simulated cells in which what is to be found is subtle, or no gene's own doing.

    - Programs A to D are on in half of the cells each; their genes are then up `FOLD` times only.
    - A and B together decide the type, with no gene of their own; C and D together raise one more
      program. Either is a conjunction: true where both are on, and not where one is alone.
    - Two genes have counts of their own, the larger of which goes to the one or the other: the
      order in which they stand in the sentence decides the type as well.

    Genes are symbols of the file of programs, dealt out anew by the seed, so that no name tells.
    Counts are negative binomial around a cell's share of its library.
    """
    import scipy.sparse as sp

    from scfm_circuits.cells.ranking import top_genes
    from scfm_circuits.cells.reading import RankedCells

    rng = generator(seed, "simulated logic")
    symbols = rng.permutation(np.array(read_plan().genes))[: LOGIC_GENES + 2]
    on = rng.random((n_cells, len(LOGIC_PROGRAMS))) < 0.5
    both = on[:, ::2] & on[:, 1::2]
    order = rng.random(n_cells) < 0.5
    level = np.exp(rng.normal(0, GENE_SPREAD / 2, LOGIC_GENES + 2))
    level = level * np.ones((n_cells, 1))
    for i, where in enumerate([*on.T, both[:, 1]]):
        own = slice(i * PROGRAM_GENES, (i + 1) * PROGRAM_GENES)
        level[:, own] *= np.where(where, FOLD, 1.0)[:, None]
    # One level for both of a cell: where either stands in the sentence alone says little.
    level[:, -2:] = PAIR_LEVEL * rng.lognormal(0, ACTIVITY_SPREAD, (n_cells, 1))
    library = rng.lognormal(np.log(LOGIC_LIBRARY), LIBRARY_SPREAD, (n_cells, 1))
    mean = level / level.sum(axis=1, keepdims=True) * library
    counts = rng.poisson(rng.gamma(1 / LOGIC_DISPERSION, LOGIC_DISPERSION * mean))
    pair = np.sort(counts[:, -2:], axis=1)
    pair[:, 1] += pair[:, 0] == pair[:, 1]
    counts[:, -2:] = np.where(order[:, None], pair[:, ::-1], pair)
    ranking = top_genes(sp.csr_matrix(counts.astype(np.float32)), np.arange(n_cells),
                        genes_per_cell, seed)
    truths = {**{(MARKERS, name): on[:, i] for i, name in enumerate(LOGIC_PROGRAMS)},
              **{(CONJUNCTIONS, f"{a} and {b}"): both[:, i]
                 for i, (a, b) in enumerate((LOGIC_PROGRAMS[:2], LOGIC_PROGRAMS[2:]))},
              (ORDER, "first before second"): order}
    labels = np.array(TYPES)[both[:, 0] + 2 * order]
    names = np.array([f"simulated_{i:04d}" for i in range(n_cells)])
    return LogicCells(RankedCells(tuple(map(str, symbols)), labels, names, (), ranking), truths)
