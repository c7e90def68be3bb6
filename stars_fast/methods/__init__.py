"""Methods as choices of segmenter, proposal, scorer, selection and schedule, each with its paper's defaults."""

from stars_fast.methods.args_mara import Args, Mara
from stars_fast.methods.base import Enumerated, Method, Population, Segments, Trial, no_parameter
from stars_fast.methods.best_of import BestOfN, BlockwiseBestOfN, RejectionSampling
from stars_fast.methods.cards import Cards
from stars_fast.methods.guided import Guide, Guided
from stars_fast.methods.metropolis import Ending, MetropolisHastings, PowerSampling, SuffixChain
from stars_fast.methods.navigator import Navigator
from stars_fast.methods.particles import ParticleFilter, TreeBoN
from stars_fast.methods.persona import PersonaJudge
from stars_fast.methods.plans import Plans
from stars_fast.methods.rsd import RSD
from stars_fast.methods.stars import Stars, Vanilla
from stars_fast.methods.stopping import OptimalStopping
from stars_fast.names import refusing_unknown

METHODS: dict[str, type[Method]] = {
    method.name: refusing_unknown(no_parameter)(method)
    for method in (
        Vanilla,
        Plans,
        BestOfN,
        RejectionSampling,
        MetropolisHastings,
        PowerSampling,
        Stars,
        Cards,
        BlockwiseBestOfN,
        OptimalStopping,
        Args,
        TreeBoN,
        ParticleFilter,
        RSD,
        Mara,
        PersonaJudge,
    )
}
Guided.known = METHODS
_every: list[type[Method]] = [*METHODS.values(), Navigator]
Method.finished_only = [method.name for method in _every if not method.scores_unfinished]
# What StarsConfig(method=...) may name: a method, or who draws for one.
NAMED: dict[str, type[Method]] = {**METHODS, Guided.name: refusing_unknown(no_parameter)(Guided)}

__all__ = [
    "METHODS",
    "RSD",
    "Args",
    "BestOfN",
    "BlockwiseBestOfN",
    "Cards",
    "Ending",
    "Enumerated",
    "Guide",
    "Guided",
    "Mara",
    "Method",
    "MetropolisHastings",
    "Navigator",
    "OptimalStopping",
    "ParticleFilter",
    "PersonaJudge",
    "Plans",
    "Population",
    "PowerSampling",
    "RejectionSampling",
    "Segments",
    "Stars",
    "SuffixChain",
    "TreeBoN",
    "Trial",
    "Vanilla",
]
