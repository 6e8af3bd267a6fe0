"""Issue a certificate at its first use, and keep it with its authority in a directory of the control node."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleLookupError  # type: ignore[import-untyped]
from ansible.plugins.lookup import LookupBase  # type: ignore[import-untyped]
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DOCUMENTATION = r"""
name: certificate
short_description: Issue a certificate at its first use, and keep it in a directory
description:
  - Reads the certificate O(name) from a directory of the control node, or issues one for O(addresses) with
    the directory's authority, which it creates too.
  - The files are C(ca.pem), C(ca.key), C(NAME.pem) and C(NAME.key). Certificates of an own authority may be
    there instead, without C(ca.key).
  - A certificate for other addresses, of another authority, or with less than a year left, is replaced.
  - In check mode no file is written; while there is none, every lookup returns a new certificate.
options:
  _terms:
    description: Paths of the directories.
    type: list
    elements: path
    required: true
  name:
    description: Name of the host, and of its files.
    type: str
    required: true
  addresses:
    description: IP addresses at which the host is reached.
    type: list
    elements: str
    required: true
author: Pixel Endpoint contributors
"""

EXAMPLES = r"""
certificate: >-
  {{ lookup('pixel.endpoint.certificate', inventory_dir ~ '/credentials/redis_tls', name=inventory_hostname,
            addresses=[private_address, '127.0.0.1']) }}
"""

RETURN = r"""
_raw:
  description: The texts C(ca), C(certificate) and C(key) of each directory, in PEM format.
  type: list
  elements: dict
"""

LIFETIME = timedelta(days=3650)
LEFT = timedelta(days=365)
_USAGES = [
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
]


def issue(
    name: str,
    addresses: list[str],
    authority: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return a certificate and its key; without an authority, the certificate of a new one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, issuer_key = (authority[0].subject, authority[1]) if authority else (subject, key)
    now = datetime.now(UTC)
    usage = "digital_signature" if authority else "key_cert_sign"
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Hosts whose clocks are late accept it too.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=not authority, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**{each: each == usage for each in _USAGES}), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if authority:
        names = [x509.IPAddress(ip_address(address)) for address in addresses]
        # Redis's processes are servers and clients of one another.
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(issuer_key, hashes.SHA256()), key


def fault(certificate: x509.Certificate, ca: x509.Certificate, addresses: list[str]) -> str:
    """Return why a certificate is of no use; empty if it is."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return "is not issued by ca.pem"
    if certificate.not_valid_after_utc - datetime.now(UTC) < LEFT:
        return f"is valid until {certificate.not_valid_after_utc:%Y-%m-%d} only"
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        own = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    except x509.ExtensionNotFound:
        own = set()
    missing = [address for address in addresses if address not in own]
    return f"is not for {', '.join(missing)}" if missing else ""


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Store:
    """A directory with an authority and certificates. In a dry run nothing is written."""

    def __init__(self, directory: Path, dry: bool) -> None:
        self._directory = directory
        self._dry = dry

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's lock: Ansible evaluates lookups of several hosts at once."""
        if self._dry:
            yield
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def get(self, name: str, addresses: list[str]) -> dict[str, str]:
        """Return the certificate of a host with its key and its authority."""
        with self.locked():
            ca, ca_key = self._authority()
            certificate, key = self._read(f"{name}.pem"), self._read(f"{name}.key")
            reason = "is missing" if not certificate else "has no key beside it" if not key else ""
            if reason or (reason := fault(x509.load_pem_x509_certificate(certificate), ca, addresses)):
                if ca_key is None:
                    raise AnsibleLookupError(
                        f"{self._directory / name}.pem {reason}. Put a certificate of your authority for"
                        f" {', '.join(addresses)} there, and its key into {name}.key."
                    )
                issued, issued_key = issue(name, addresses, (ca, ca_key))
                certificate, key = issued.public_bytes(Encoding.PEM), _pem(issued_key)
                self._write(f"{name}.key", key, 0o600)
                self._write(f"{name}.pem", certificate, 0o644)
            texts = {"ca": ca.public_bytes(Encoding.PEM), "certificate": certificate, "key": key}
        return {part: text.decode() for part, text in texts.items()}

    def _authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey | None]:
        certificate, key = self._read("ca.pem"), self._read("ca.key")
        if certificate:
            own = load_pem_private_key(key, None) if key else None
            assert own is None or isinstance(own, ec.EllipticCurvePrivateKey)
            return x509.load_pem_x509_certificate(certificate), own
        issued, issued_key = issue("Pixel Endpoint", [])
        self._write("ca.key", _pem(issued_key), 0o600)
        self._write("ca.pem", issued.public_bytes(Encoding.PEM), 0o644)
        return issued, issued_key

    def _read(self, name: str) -> bytes:
        path = self._directory / name
        return path.read_bytes() if path.exists() else b""

    def _write(self, name: str, data: bytes, mode: int) -> None:
        if self._dry:
            return
        new = self._directory / f".{name}.new"
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        new.rename(self._directory / name)


class LookupModule(LookupBase):  # type: ignore[misc]
    """Returns the certificates of a host from directories."""

    def run(
        self, terms: list[str], variables: dict[str, Any] | None = None, *, name: str, addresses: list[str]
    ) -> list[dict[str, str]]:
        """Return the certificate of each directory; variables contain `ansible_check_mode`."""
        dry = bool((variables or {}).get("ansible_check_mode", False))
        try:
            return [Store(Path(term), dry).get(name, addresses) for term in terms]
        except (OSError, ValueError) as error:
            raise AnsibleLookupError(f"The certificate of {name} can't be read or issued: {error}") from error
