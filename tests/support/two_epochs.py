"""Two epochs of one recipe."""

from kanyun.manifest import Manifest
from kanyun.storage import Folder
from pipeline.recipe import RATIOS, Recipe
from pipeline.stages.build import BuildStage
from pipeline.stages.pack import PackStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage


def two_epochs(recipe: Recipe) -> list[str]:
    """Run the recipe, then sample, build and pack of epoch 1; return the content digests of both epochs.

    In tasks and buckets so small that there are several.
    """
    PackStage.bucket_samples, usual = 60, PackStage.bucket_samples
    PreprocessStage.task_bytes, usual_bytes = (2 << 10, 2 << 10), PreprocessStage.task_bytes
    try:
        recipe.run(overwrite=False)
        out = Folder(recipe.output)
        sample, build = (out / "sample-1").uri, (out / "build-1").uri
        SampleStage((out / "filter").uri, sample, epoch=1, seed=recipe.seed, ratios=(out / RATIOS).uri).run()
        BuildStage(sample, build, tokenizer=recipe.tokenizer, length=recipe.length).run()
        PackStage.below(build, (out / "packed").uri, recipe.length).run()
    finally:
        PackStage.bucket_samples, PreprocessStage.task_bytes = usual, usual_bytes
    packed = out / "packed"
    return [Manifest.load(packed / name).content_digest for name in packed.names()]
