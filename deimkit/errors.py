"""One family of errors, so that a caller can catch what deimkit refuses and nothing else."""


class DeimkitError(ValueError):
    """What deimkit refuses, said as: what was expected, what it got, and the remedy."""


class DataError(DeimkitError):
    """A dataset, an annotation or an image that cannot be used as it is."""


class RecipeError(DeimkitError):
    """A recipe that does not exist, has a misspelt field, or asks for something impossible."""


class CheckpointError(DeimkitError):
    """A checkpoint that is missing, damaged, unsafe, or made for other classes."""


class NonFiniteError(DeimkitError):
    """A loss or a prediction that is no longer a finite number."""


class DeployError(DeimkitError):
    """A file, a runtime, or a machine that cannot export, run or measure a detector as asked."""
