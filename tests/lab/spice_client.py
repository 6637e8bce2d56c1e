"""A SPICE client without a screen: connects, says so, and stays until its stdin ends.

    /usr/bin/python3 spice_client.py HOST PORT < pipe     (the password is the first line of stdin)

Runs under Debian's own Python, which has gi and gir1.2-spiceclientglib-2.0. Prints ``connected`` once a channel is
open, ``refused`` when the server turns it away, ``moved HOST PORT`` when it goes on at the guest's new server node, and
``closed`` when its connection ends otherwise.
"""

import sys

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import GLib, GObject, SpiceClientGLib  # noqa: E402

REFUSED = {
    SpiceClientGLib.ChannelEvent.ERROR_AUTH, SpiceClientGLib.ChannelEvent.ERROR_CONNECT,
    SpiceClientGLib.ChannelEvent.ERROR_LINK, SpiceClientGLib.ChannelEvent.ERROR_IO,
}  # fmt: skip

session = SpiceClientGLib.Session()
loop = GLib.MainLoop()
first = []


def on_event(_channel, event):
    if event == SpiceClientGLib.ChannelEvent.OPENED:
        print("connected", flush=True)
    elif event == SpiceClientGLib.ChannelEvent.CLOSED:
        print("closed", flush=True)
    elif event in REFUSED:
        print("refused", event.value_nick, flush=True)
        loop.quit()


def on_channel(_session, channel):
    # Session and Channel have a connect() of their own
    GObject.Object.connect(channel, "channel-event", on_event)
    SpiceClientGLib.Channel.connect(channel)


def on_migration(_session, _property):
    """Once it is over, the session knows the new server node as its host."""
    now = (session.get_property("host"), session.get_property("port"))
    if session.get_property("migration-state") == SpiceClientGLib.SessionMigration.NONE and now != first[0]:
        first[0] = now
        print("moved", *now, flush=True)


def on_stdin(_source, _condition):
    session.disconnect()
    loop.quit()
    return False


session.set_property("host", sys.argv[1])
session.set_property("port", sys.argv[2])
session.set_property("password", sys.stdin.readline().strip())
first.append((sys.argv[1], sys.argv[2]))
GObject.Object.connect(session, "channel-new", on_channel)
GObject.Object.connect(session, "notify::migration-state", on_migration)
GLib.io_add_watch(sys.stdin, GLib.PRIORITY_DEFAULT, GLib.IOCondition.IN | GLib.IOCondition.HUP, on_stdin)
SpiceClientGLib.Session.connect(session)
loop.run()
