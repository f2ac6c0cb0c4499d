"""Progress and previews: every event of a job as it happens."""

import os
from pathlib import Path

from hidream import Client
from hidream.events import ImageFinished, Preview, Progress, Queued, Restarted, Started, Succeeded

with Client(os.environ.get("HIDREAM_ADDRESS", "localhost:8088")) as client:
    for event in client.generate("a yellow star on a black background", seed=7, preview=True):
        match event:
            case Queued():
                print("position", event.queue_position, "in the queue")
            case Started():
                print(f"started, {event.spec.width}×{event.spec.height}, seed {event.spec.seed}")
            case Progress():
                print(f"step {event.step} of {event.total_steps}, {event.step_seconds:.3f} s")
            case Preview():
                Path("star_preview.jpg").write_bytes(event.data)
            case Restarted():
                print(f"{event.reason}: goes on after step {event.resumed_from_step}")
            case ImageFinished():
                event.image.save("star.png")
            case Succeeded():
                print(f"done in {event.timings.total_seconds:.2f} s")
