"""Adds a signed C2PA manifest to the file of an image: who says that a model generated it."""

from __future__ import annotations

import io
import json

import msgspec

from hidream_grpc.version import SERVER_VERSION

_TRAINED_ALGORITHMIC_MEDIA = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MANIFEST = {
    "claim_generator_info": [{"name": "hidream-grpc", "version": SERVER_VERSION}],
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {
                "actions": [{"action": "c2pa.created", "digitalSourceType": _TRAINED_ALGORITHMIC_MEDIA}]
            },
        }
    ],
}
# A thumbnail would be a second image in the file.
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}


class ManifestSigner(msgspec.Struct, frozen=True, kw_only=True):
    """Signs images with one certificate; never says its key in words.

    Attributes:
        certificates: PEM of the certificate, then of those between it and its authority.
        key: PEM of the certificate's private key, as PKCS #8.
        algorithm: how the key signs, in the words of C2PA: es256, es384, es512, ps256 or ed25519.
    """

    certificates: bytes
    key: bytes
    algorithm: str

    def __repr__(self) -> str:
        return f"ManifestSigner({self.algorithm})"

    def sign(self, file: bytes, mime_type: str) -> bytes:
        """The file with a manifest, which has an identifier of its own: no two results are the same.

        Raises:
            c2pa.C2paError: the certificate is not fit for this, or not valid now.
        """
        # An extra of the distribution: 23 MB, loaded where images are signed.
        import c2pa

        info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
        signed = io.BytesIO()
        with (
            c2pa.Settings.from_dict(_SETTINGS) as settings,
            c2pa.Context(settings) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(json.dumps(_MANIFEST), context) as builder,
        ):
            builder.sign(signer, mime_type, io.BytesIO(file), signed)
        return signed.getvalue()
