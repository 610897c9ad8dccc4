"""Classifies a photo on a server that sees neither the photo nor the answer.

Run it against a server of EfficientNet-Lite0 (README.md here starts one in two lines), with what
`lasagna serve` printed and any picture. It needs `pip install 'lasagna[demo]'`, for Pillow.

    python examples/client.py URL MEASUREMENT BROKER_KEY photo.jpg
"""

import sys
from pathlib import Path

from lasagna import Client
from lasagna.errors import LasagnaError
from lasagna.models.zoo.labels import best_guesses
from lasagna.models.zoo.photos import file_input
from lasagna.trust.policy import MeasurementIn

if len(sys.argv) != 5:
    sys.exit(__doc__)
url, measurement, broker_key, photo = sys.argv[1:]

try:
    with Client(
        url,
        policy=MeasurementIn(frozenset({bytes.fromhex(measurement)})),  # the code you trust
        brokers=[bytes.fromhex(broker_key)],  # who may give that code its keys
        insecure_allow_emulated=True,  # without SGX nothing is protected; with it, leave this out
    ) as client:
        outputs = client.infer("efficientnet-lite0", {"image": file_input(Path(photo))})
except (LasagnaError, OSError) as error:
    sys.exit(f"error: {error}")

for guess in best_guesses(outputs["probabilities"]):
    print(f"{guess.probability:6.1%}  {guess.label}")
