"""One image: ask for it, wait for it, save it."""

import os

from hidream import Client

with Client(os.environ.get("HIDREAM_ADDRESS", "localhost:8088")) as client:
    [image] = client.draw("a red circle on a blue background", seed=7)
    image.save("one_image.png")
    print(image)
