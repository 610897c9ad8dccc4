"""Seals an ONNX model from Python, and looks into the package with and without its key.

    python examples/seal_a_model.py model.onnx

It writes model.lsg, which may go to any server, model.key, which goes to the key broker only, and
owner.pem, which signs your packages, beside the model. A model with open dimensions besides the
batch needs them fixed: load_source(path, {"sequence": 128}).
"""

import sys
from pathlib import Path

from lasagna.cli.keygen import create_owner_key, read_owner_key
from lasagna.errors import LasagnaError
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import load_source
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import encode_model_keys

if len(sys.argv) != 2:
    sys.exit(__doc__)
path = Path(sys.argv[1])
package_file, key_file = path.with_suffix(".lsg"), path.with_suffix(".key")
owner_file = path.with_name("owner.pem")
owner = read_owner_key(owner_file) if owner_file.exists() else create_owner_key(owner_file)
key_file.touch(mode=0o600, exist_ok=False)  # readable by its owner alone from its first byte on

options = SealOptions(slice_bytes=512 * 1024)  # the smaller the slices, the smaller the enclave
try:
    keys, report = seal(load_source(path), path.stem, owner, package_file, options)
except (LasagnaError, OSError) as error:
    key_file.unlink()
    sys.exit(f"error: {error}")
key_file.write_bytes(encode_model_keys(keys))
difference = max(report.self_check.values())
print(f"sealed {report.file_bytes} bytes; differs from ONNX Runtime by {difference:.0e} at most")

with Package(package_file) as package:
    # What anybody may know: sizes, slices and times. Clients can pin the digest.
    variant = package.manifest.variants[0]
    print(f"digest {package.model_digest.hex()}")
    print(f"{len(variant.slices)} slices with {variant.weight_bytes} bytes of weights")

    # With the key: the layers, and every section opened and checked.
    package.verify_signature(keys.owner_public_key)
    opened = OpenPackage(package, keys.content_key.reveal())
    for section in range(len(package.manifest.sections)):
        opened.read_section(section)
    print(f"{len(package.manifest.sections)} sections open and are unchanged")
    for number, details in enumerate(opened.details(variant).slices):
        layers = ", ".join(f"{layer.op} {layer.name}".strip() for layer in details.layers)
        print(f"slice {number}: {layers}")
