"""FiftyOne: a run's images, annotations and predictions in its App, and what that needs on this machine.

`to_fiftyone` (samples) makes a FiftyOne dataset, `launch` (app) shows it, `connect` (database) opens where it is kept,
and `ready` (readiness) says what is missing. Inside this package `import fiftyone` is the real one.
"""
