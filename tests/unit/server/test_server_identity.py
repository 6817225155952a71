"""Ids and tokens: what was issued is recognised, and nothing else is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.identity import PREFIXES, Identity, Issued, TokenClaims, rater_of_key, rater_of_token

IDENTITY = Identity(b"a secret of enough bytes", token_hours=1)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key_id", ["442f048282d1", "key-with-dashes", "k_1"])
@pytest.mark.parametrize("choices", [None, 1, 12, 100_000])
def test_an_issued_id_names_its_key_and_choices(prefix: str, key_id: str, choices: int | None) -> None:
    id_ = prefix + IDENTITY.new_request_id(key_id, choices)
    assert IDENTITY.issued(id_) == Issued(key_id, choices)
    assert IDENTITY.owner(id_) == key_id
    assert len(id_) < 100


def test_more_choices_can_t_be_written_into_an_id() -> None:
    for choices in (2, None):
        key_id, nonce, mac = IDENTITY.new_request_id("k1", choices).rsplit("-", 2)
        random = nonce.rpartition("x")[2]
        for forged in (f"9x{random}", f"22x{random}", random if choices else f"1x{random}"):
            assert IDENTITY.issued(f"cmpl-{key_id}-{forged}-{mac}") is None


def test_ids_are_never_given_twice() -> None:
    assert len({IDENTITY.new_request_id("k") for _ in range(1000)}) == 1000


@given(st.text(max_size=80))
def test_made_up_ids_belong_to_nobody(text: str) -> None:
    assert IDENTITY.owner(text) is None
    assert IDENTITY.owner(f"chatcmpl-{text}") is None


@given(place=st.integers(0, 2**16), shift=st.integers(1, 16))
def test_a_changed_id_belongs_to_nobody(place: int, shift: int) -> None:
    prefix, id_ = "chatcmpl-", IDENTITY.new_request_id("442f048282d1", 4)
    characters, at = "0123456789abcdefx-", place % len(id_)
    other = characters[(characters.index(id_[at]) + shift) % len(characters)]
    assert IDENTITY.owner(prefix + id_[:at] + other + id_[at + 1 :]) is None


def test_an_id_of_another_secret_belongs_to_nobody() -> None:
    stranger = Identity(b"another secret of enough bytes", token_hours=1)
    assert IDENTITY.owner("cmpl-" + stranger.new_request_id("k")) is None


def test_a_key_cannot_borrow_the_nonce_of_another() -> None:
    _, nonce, mac = IDENTITY.new_request_id("mine").rsplit("-", 2)
    assert IDENTITY.owner(f"cmpl-yours-{nonce}-{mac}") is None


def test_a_token_gives_back_its_claims() -> None:
    for claims in (TokenClaims("chatcmpl-x", None), TokenClaims("chatcmpl-x", "zoë/1")):
        assert IDENTITY.read_token(IDENTITY.new_token(claims)) == claims


def test_a_token_that_was_changed_or_made_elsewhere_is_none() -> None:
    token = IDENTITY.new_token(TokenClaims("chatcmpl-x", None))
    stranger = Identity(b"another secret of enough bytes", token_hours=1)
    assert IDENTITY.read_token(token[:-2] + ("aa" if token[-2:] != "aa" else "bb")) is None
    assert IDENTITY.read_token(stranger.new_token(TokenClaims("chatcmpl-x", None))) is None
    assert IDENTITY.read_token("") is None


def test_a_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    token = IDENTITY.new_token(TokenClaims("chatcmpl-x", None))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3500)
    assert IDENTITY.read_token(token) is not None
    monkeypatch.setattr(time, "time", lambda: now + 3700)
    assert IDENTITY.read_token(token) is None


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        Identity(b"short", token_hours=1)


def test_raters_live_in_the_namespace_of_their_key() -> None:
    assert rater_of_key("k1", "bob") == "k1/bob"
    assert rater_of_key("k1", None) == "k1/"
    assert rater_of_token("k1", TokenClaims("cmpl-1", "bob")) == "k1/user:bob"
    assert rater_of_token("k1", TokenClaims("cmpl-1", None)) == "k1/anonymous:cmpl-1"
