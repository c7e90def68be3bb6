"""Methods as choices of segmenter, proposal, scorer, selection and schedule, each with its paper's defaults."""

from stars_fast.methods.base import Enumerated, Method, Population, Segments, Trial
from stars_fast.methods.one_leaf import BestOfN, BlockwiseBestOfN, Cards, RejectionSampling, Stars, Vanilla
from stars_fast.methods.population import ParticleFilter, TreeBoN
from stars_fast.methods.token_level import Args, Mara
from stars_fast.methods.two_policies import RSD, PersonaJudge

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Vanilla,
        BestOfN,
        RejectionSampling,
        Stars,
        Cards,
        BlockwiseBestOfN,
        Args,
        TreeBoN,
        ParticleFilter,
        RSD,
        Mara,
        PersonaJudge,
    )
}

__all__ = [
    "METHODS",
    "RSD",
    "Args",
    "BestOfN",
    "BlockwiseBestOfN",
    "Cards",
    "Enumerated",
    "Mara",
    "Method",
    "ParticleFilter",
    "PersonaJudge",
    "Population",
    "RejectionSampling",
    "Segments",
    "Stars",
    "TreeBoN",
    "Trial",
    "Vanilla",
]
