"""What the profile of a step says to change: every rule is a function from its numbers to a sentence, or to none."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deimkit.training.profile import Profile

WAITS = 8  # for the GPU in a step, in each micro-batch; a step of ours has 6


def advice(profile: Profile) -> list[str]:
    """What all rules have to say."""
    return [sentence for rule in RULES if (sentence := rule(profile))]


def images(profile: Profile) -> str | None:
    """More loader processes, where a tenth of a step and more is waiting, and there are cores for them."""
    stage = max(profile.stages, key=lambda stage: stage.share("images"))
    if stage.share("images") < 0.1:
        return None
    waits = f"Steps of the {stage.stage} stage wait {stage.share('images'):.0%} of their time for images"
    one = stage.loader_s * max(profile.workers, 1)  # seconds that a single process takes for a batch
    enough = ceil(one / (stage.step_s - stage.seconds["images"]))
    if enough <= profile.workers:
        return (
            f"{waits}, although the loader alone keeps up: its {profile.workers} process(es) and the step share "
            f"{profile.cores} cores. Train where there are more."
        )
    if enough >= profile.cores:
        return (
            f"{waits}. It would take {enough} loader process(es) beside the one that trains, and here are "
            f"{profile.cores} cores: train where there are more, or store the images smaller, which decodes faster."
        )
    return f"{waits}: workers={enough} instead of {profile.workers} would load them meanwhile."


def copying(profile: Profile) -> str | None:
    """Loader processes, whose images a GPU can fetch by itself, where it has to wait for the others."""
    share = profile.stage(profile.main).share("copy")
    if profile.gpu is None or profile.workers or share < 0.03:
        return None
    return (
        f"Bringing images to the GPU takes {share:.0%} of a step, as the process that trains loads them too: workers=1 "
        "or more puts them where the GPU fetches them while the host goes on."
    )


def memory(profile: Profile) -> str | None:
    """A larger batch where half of a GPU's memory is free, micro-batches where next to nothing is."""
    if profile.total_memory is None or profile.memory is None:
        return None
    free = 1 - profile.peak / profile.total_memory
    at_once = profile.batch // profile.accumulate
    if free < 0.05:
        more = 2 * profile.accumulate
        return f"Only {free:.0%} of the GPU's memory is free, and some batch will be more crowded: accumulate={more}."
    if free < 0.5:
        return None
    if profile.accumulate > 1:
        return f"{free:.0%} of the GPU's memory is free: accumulate={profile.accumulate} is more than it takes."
    before = profile.memory["images"]  # weights, gradients' and optimiser's memory, the average
    each = max(profile.peak - before, 1) / at_once
    fit = int((0.9 * profile.total_memory - before) / each)
    return (
        f"A batch of {profile.batch} leaves {free:.0%} of the GPU's memory free: about {fit} images would fit, and the "
        "more there are the less each costs. Rates and moving average follow the batch."
    )


def precision(profile: Profile) -> str | None:
    """bfloat16, where a GPU has it and does not use it."""
    if profile.precision != "float32" or not profile.has_bf16:
        return None
    share = profile.stage(profile.main).share("backbone", "encoder", "decoder", "backward")
    return (
        f"{share:.0%} of a step is forward and backward in float32: precision='bf16' halves the bytes that they move, "
        "and computes on the GPU's matrix units."
    )


def compiled(profile: Profile) -> str | None:
    """Whether compiling pays, which only a measurement says."""
    c = profile.compiled
    if c is None:
        return None
    if c.ratio > 0.97:
        return f"Leave compile off: a compiled step takes {c.ratio:.0%} of the time of one that is not."
    steps = ceil(c.build_s / (c.eager_s * (1 - c.ratio)))
    return (
        f"compile=True saves {1 - c.ratio:.0%} of a step; after {steps:,} steps the {c.build_s:.0f} s are back that "
        "compiling takes."
    )


def idle(profile: Profile) -> str | None:
    """More work for every kernel, where a GPU has nothing to do in a quarter of a step and more."""
    if profile.idle is None or profile.idle - profile.stage(profile.main).share("images") < 0.25:
        return None
    fewer = "" if profile.compiled is not None else ", or see with --compile whether fewer kernels do"
    return (
        f"The GPU idles for {profile.idle:.0%} of a step, while the host prepares its {profile.kernels:.0f} kernels: "
        f"give it more images at once{fewer}."
    )


def waits(profile: Profile) -> str | None:
    """Fewer questions to the GPU, where a step has more than ours do."""
    if profile.waits is None or sum(profile.waits.values()) <= WAITS * profile.accumulate:
        return None
    place, most = max(profile.waits.items(), key=lambda item: item[1])
    return (
        f"The host waits for the GPU {sum(profile.waits.values())} times a step, {most} of them at {place}: keep what "
        "is asked there on the device."
    )


def dense(profile: Profile) -> str | None:
    """What Dense O2O costs, where its steps are slower than those of the stage after it."""
    found = {stage.stage: stage for stage in profile.stages}
    other = found.get("augment") or found.get("clean")
    if "dense" not in found or other is None:
        return None
    much, little = found["dense"], other
    times = (much.step_s - much.seconds.get("images", 0.0)) / (little.step_s - little.seconds.get("images", 0.0))
    if times < 1.1:
        return None
    return (
        f"Steps of the dense stage take {times:.1f} times as long as those of the {little.stage} stage, with "
        f"{much.boxes:.0f} boxes in an image instead of {little.boxes:.0f}: matching and losses are "
        f"{much.share('matching', 'losses'):.0%} of them instead of {little.share('matching', 'losses'):.0%}. A lower "
        "Augment.mosaic or mixup makes them cheaper."
    )


def threads(profile: Profile) -> str | None:
    """All cores, where a CPU trains with fewer threads."""
    spare = profile.cores - profile.workers
    if profile.device != "cpu" or profile.threads >= spare:
        return None
    return f"Torch computes with {profile.threads} thread(s), and {spare} cores are free: OMP_NUM_THREADS={spare}."


RULES = (images, copying, memory, precision, compiled, idle, waits, dense, threads)
