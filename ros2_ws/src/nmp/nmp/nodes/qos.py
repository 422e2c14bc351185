"""QoS profiles of rclpy from the facts in :mod:`nmp.topics`."""

from __future__ import annotations

from rclpy.event_handler import PublisherEventCallbacks, SubscriptionEventCallbacks
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy

from nmp.topics import TopicQos


def profile(qos: TopicQos) -> QoSProfile:
    """Return the profile of a topic."""
    return QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=qos.depth,
        reliability=ReliabilityPolicy.RELIABLE if qos.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if qos.latched else DurabilityPolicy.VOLATILE,
    )


def reader_events(qos: TopicQos) -> SubscriptionEventCallbacks:
    """Return what rclpy is to tell of a subscription's partners: that their quality of service or type does not fit.

    Each such event is one more thing that the executor waits for with every message, as dear as a subscription. A
    best-effort reader takes all that is offered; a type that does not fit is told on /diagnostics.
    """
    return SubscriptionEventCallbacks(use_default_callbacks=qos.reliable)


def writer_events(qos: TopicQos) -> PublisherEventCallbacks:
    """Return the same of a publisher: what is reliable and latched fits whoever subscribes."""
    return PublisherEventCallbacks(use_default_callbacks=not (qos.reliable and qos.latched))
