"""A model's server as a command line names it: what is read, and every entry that is wrong."""

import pytest

from cosmo_rl.cpgd.judges.spec import ACTIVATION, GRADED, base_url, check_shared, parse_server, score_range
from cosmo_rl.data.errors import UserError


@pytest.mark.parametrize(("url", "message"), [
    ("ftp://h", "'ftp://h' is no URL of a server; give the base URL"), ("host:8000", "is no URL of a server"),
    ("", "is no URL of a server"), ("http://u:swordfish@h", "the URL holds a password"),
    ("http://h?key=swordfish", "the URL holds a password or a query"), ("http://[", "is no URL"),
    ("http://u:swordfish@[", "the URL holds a password"), ("http://h:port", "is no URL"), ("http://", "is no URL of"),
    ("http://h /v1", "is no URL of a server"), ("http://a,b", "is no URL of a server"), ("http://h:0", "is no URL of"),
])
def test_a_bad_url_is_refused(url, message):
    with pytest.raises(UserError, match=message) as error:
        base_url(url)
    assert "swordfish" not in str(error.value)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1#a"])
def test_the_url_may_end_in_v1(url):
    assert base_url(url) == "http://h:1"
    assert base_url("https://[::1]:8/judge/v1") == "https://[::1]:8/judge"


def test_options_become_arguments():
    server = parse_server(" http://h:1/v1 , m ,key=K_1,in-flight=08,timeout=0.5,attempts=3,graded=yes,activation=-1:2",
                          "it", {**GRADED, **ACTIVATION})
    assert (server.url, server.model) == server.place[:2] == ("http://h:1", "m") and server.place[2] == "K_1"
    assert server.options == {"api_key_env": "K_1", "max_in_flight": 8, "timeout_s": 0.5, "attempts": 3}
    assert server.more == {"graded": True, "activation": "-1:2"}
    assert parse_server("http://h,m,graded=no", "it", GRADED).more == {"graded": False}


@pytest.mark.parametrize(("text", "message"), [
    ("http://h:1", "it has no model after its URL; write URL,MODEL, and after them key=JUDGE_KEY, in-flight=8, "),
    ("http://h:1,key=KEY", "it has no model after its URL"), (",m", "it has no model after its URL"),
    ("http://h:1,m,sk-swordfish", "it: part 3 is no NAME=VALUE"), ("http://h:1,m,key=", "it: part 3 is no NAME=VALUE"),
    ("http://h:1,m,in_flight=3", "it: there is no option 'in_flight'; write URL,MODEL, and after"),
    *((f"http://h:1,m,in-flight={n}", f"it: in-flight is a whole number of at least 1, and not '{n}'; give it as "
       "in-flight=8") for n in ("x", "0", "-1", "1.5", "1" * 10)),
    *((f"http://h:1,m,timeout={n}", f"it: timeout is a number of seconds above 0, and not '{n}'; give it as")
      for n in ("nan", "inf", "0", "soon")),
    ("http://h:1,m,attempts=2,attempts=3", "it: attempts is given twice; give it once"),
    ("http://h:1,m,key=sk-swordfish", "key is the NAME of an environment variable, in capitals; give it as key=JUDGE"),
    ("http://h:1,m,graded=maybe", "graded is yes or no, and not 'maybe'; give it as graded=no"),
    *((f"http://h:1,m,activation={a}", f"activation is none, sigmoid or LOW:HIGH, and not '{a}'; give it as")
      for a in ("1", "2:1", "a:b", "nan:1", "0:inf")),
    ("http://u:swordfish@h,m", "it: the URL holds a password or a query"), ("nowhere,m", "it: 'nowhere' is no URL of"),
])
def test_a_wrong_entry_is_told_without_what_may_be_a_secret(text, message):
    with pytest.raises(UserError) as error:
        parse_server(text, "it", {**GRADED, **ACTIVATION})
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "swordfish" not in str(error.value)


def test_servers_that_share_an_endpoint_are_asked_alike():
    entries = ("http://h,m", "http://h/v1,m", "http://h,m,attempts=3", "http://h,m,key=K,attempts=3",
               "http://h,n,attempts=4")
    servers = {text: parse_server(text, "it") for text in entries}
    check_shared({text: servers[text] for text in entries[:2]})
    check_shared({text: servers[text] for text in (entries[0], *entries[3:])})
    with pytest.raises(UserError, match=r"share http://h \(model m\), but attempts is the default for one and 3 "):
        check_shared(servers)


def test_a_score_range_is_read():
    assert score_range("-10:10") == (-10.0, 10.0)
    with pytest.raises(UserError, match="the activation is '1:1'; give none, sigmoid or LOW:HIGH, as -10:10"):
        score_range("1:1")
