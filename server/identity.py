"""Names that can't be forged: completion ids, feedback tokens and rater identities.

A completion id carries the key it was issued to, how many choices were asked for, and a MAC, so every replica
can tell from the id alone that it was issued, to whom, and which choices it has, before the record of the
completion has arrived anywhere. A replica also knows by a MAC what another one sends it. Keys themselves are
`feedback.keys`' business.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal, get_args

from itsdangerous import BadSignature, URLSafeTimedSerializer

Errand = Literal["serve", "shadow"]
"""Why one replica sends another one a request: to be answered in its place, or only to be recorded."""

_ERRANDS: tuple[Errand, ...] = get_args(Errand)

SHADOW_OWNER = "shadow"
"""In the place of a key in the ids of what nobody was given; no key has this id."""

PREFIXES = ("chatcmpl-", "cmpl-", "resp_")
"""What vLLM's endpoints put before the request id that the middleware gives them."""

_SALT = "instructloop.feedback-token"


@dataclass(frozen=True, slots=True)
class Issued:
    """What a completion id says: the key it was issued to, and its choices' number (None: not known then)."""

    key_id: str
    choices: int | None


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a feedback token is good for: one completion, for one end user if the client named one.

    The completion's id binds the number of its choices too.
    """

    completion_id: str
    user: str | None


class Identity:
    """Issues and checks ids and tokens under one secret, which all replicas share."""

    def __init__(self, secret: bytes, *, token_hours: float) -> None:
        if len(secret) < 16:
            raise ValueError("the secret must have at least 16 bytes")
        self._secret = hashlib.sha256(b"instructloop.completion-id" + secret).digest()
        self._errands = hashlib.sha256(b"instructloop.errand" + secret).digest()
        self._tokens = URLSafeTimedSerializer(
            secret, salt=_SALT, signer_kwargs={"digest_method": hashlib.sha256}
        )
        self._token_seconds = token_hours * 3600

    def new_request_id(self, key_id: str, choices: int | None = None) -> str:
        """`<key_id>-<choices>x<16 hex>-<12 hex MAC>`, without `<choices>x` where their number is not known.

        A completion id is an endpoint's prefix and this.
        """
        nonce = secrets.token_hex(8) if choices is None else f"{choices}x{secrets.token_hex(8)}"
        return f"{key_id}-{nonce}-{self._mac(key_id, nonce)}"

    def issued(self, completion_id: str) -> Issued | None:
        """Return what a completion id says; None if this server never issued it."""
        prefix = next((prefix for prefix in PREFIXES if completion_id.startswith(prefix)), None)
        parts = completion_id.removeprefix(prefix or "").rsplit("-", 2)
        if prefix is None or len(parts) != 3:
            return None
        key_id, nonce, mac = parts
        expected = self._mac(key_id, nonce)
        if not hmac.compare_digest(expected.encode(), mac.encode("utf-8", "surrogatepass")):
            return None
        choices, counted, _ = nonce.partition("x")
        return Issued(key_id, int(choices) if counted else None)

    def is_counted(self, completion_id: str) -> bool:
        """Whether a completion id that was issued says how many choices there are."""
        return "x" in completion_id.rsplit("-", 2)[-2]

    def owner(self, completion_id: str) -> str | None:
        """Return the key id that a completion id was issued to; None if this server never issued it."""
        found = self.issued(completion_id)
        return None if found is None else found.key_id

    def new_token(self, claims: TokenClaims) -> str:
        """Make a token for an end user's browser: feedback on this one completion, until it expires."""
        return str(self._tokens.dumps([claims.completion_id, claims.user]))

    def read_token(self, token: str) -> TokenClaims | None:
        """Return the claims of a token, or None if it is forged, damaged or expired."""
        try:
            completion_id, user = self._tokens.loads(token, max_age=int(self._token_seconds))
        except BadSignature:
            return None
        return TokenClaims(completion_id, user)

    def seal(self, errand: Errand, key_id: str, path: str, body: bytes) -> str:
        """Return the header by which a replica tells another one that it sends this very request, and why."""
        return f"{errand}.{self._errand_mac(errand, key_id, path, body)}"

    def errand(self, seal: str, key_id: str, path: str, body: bytes) -> Errand | None:
        """Return why another replica sends this request; None if none did."""
        name, _, mac = seal.partition(".")
        for errand in _ERRANDS:
            expected = self._errand_mac(errand, key_id, path, body)
            if name == errand and hmac.compare_digest(expected.encode(), mac.encode("utf-8", "replace")):
                return errand
        return None

    def _errand_mac(self, errand: Errand, key_id: str, path: str, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        return hmac.digest(self._errands, f"{errand}\0{key_id}\0{path}\0{digest}".encode(), "sha256").hex()

    def _mac(self, key_id: str, nonce: str) -> str:
        message = f"{key_id}\0{nonce}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._secret, message, "sha256").hex()[:12]


def rater_of_key(key_id: str, rater: str | None) -> str:
    """Identity of a rater whom a key vouches for, in that key's own namespace."""
    return f"{key_id}/{rater or ''}"


def rater_of_token(key_id: str, claims: TokenClaims) -> str:
    """Identity of an end user who holds a feedback token; without a user, one rater a completion."""
    if claims.user is not None:
        return f"{key_id}/user:{claims.user}"
    return f"{key_id}/anonymous:{claims.completion_id}"
