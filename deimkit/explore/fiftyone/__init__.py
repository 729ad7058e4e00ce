"""FiftyOne: a run's images, annotations and predictions in its App, and what that needs on this machine.

`to_fiftyone` makes a FiftyOne dataset, `launch` shows it, `agreement` holds its AP against ours, `marked` brings back
what was tagged there, `connect` opens where it is kept, and `ready` says what is missing. Inside this package `import
fiftyone` is the real one, and happens only in functions.
"""

from deimkit.explore.fiftyone.agreement import agreement
from deimkit.explore.fiftyone.app import launch
from deimkit.explore.fiftyone.database import connect
from deimkit.explore.fiftyone.marks import marked
from deimkit.explore.fiftyone.readiness import ready
from deimkit.explore.fiftyone.samples import to_fiftyone
from deimkit.explore.fiftyone.saved_views import view_of

__all__ = ["agreement", "connect", "launch", "marked", "ready", "to_fiftyone", "view_of"]
