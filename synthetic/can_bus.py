"""CAN bus messages of one scene, with the keys and the key order of the nuScenes CAN bus expansion.

The order accel, orientation, pos, rotation_rate, (utime,) vel matters, because readers concatenate a pose message's values in it.
"""

from collections.abc import Callable

import numpy as np

from synthetic.street import Street
from synthetic.tables import scene_start_us, yaw_quaternion

_MARGIN = 0.1
"""Seconds that messages begin before the first and end after the last key frame."""
_WHEEL_RADIUS, _WHEEL_BASE, _STEERING_RATIO = 0.31, 2.6, 16.0
"""Radius of the wheels and distance between the axles in metres; angle of the steering wheel divided by that of the front wheels."""
_GRAVITY = 9.81
"""Acceleration of gravity in m/s^2."""
_ROUTE_MARGIN = 50.0
"""Metres that the route begins before the first and ends after the last position of the ego."""


def can_messages(street: Street) -> dict[str, list | dict]:
    """Content of each CAN bus file of a scene; the key is the last part of the file's name."""
    names = _STREAMS if street.config.full_can_bus else ("pose",)
    streams = {name: _messages(street, *_STREAMS[name]) for name in names}
    length = float(street.ego.travelled(street.config.duration))
    route = street.road.point(np.arange(-_ROUTE_MARGIN, length + _ROUTE_MARGIN, 1.0)).tolist()
    return {**streams, "route": route, "meta": {name: _summary(messages) for name, messages in streams.items()}}


def _messages(street: Street, rate: int, message: Callable[[Street, float], dict]) -> list[dict]:
    """Messages at `rate` per second over the whole scene; `message` returns one for a time in seconds, with a `utime` to replace."""
    count = int(np.ceil((street.config.duration + 2 * _MARGIN) * rate)) + 1
    times = -_MARGIN + np.arange(count) / rate
    start_us = scene_start_us(street.scene_name)
    return [{**message(street, t), "utime": start_us + round(t * 1e6)} for t in times.tolist()]


def _summary(messages: list[dict]) -> dict:
    span = (messages[-1]["utime"] - messages[0]["utime"]) / 1e6
    return {"message_count": len(messages), "message_freq": len(messages) / max(span, 1e-6), "timespan": span, "var_stats": {}}


def _acceleration(street: Street, t: float) -> list[float]:
    return [street.ego.acceleration, street.ego.speed_at(t) ** 2 * street.road.curvature, _GRAVITY]


def _turn_rate(street: Street, t: float) -> float:
    return street.ego.speed_at(t) * street.road.curvature


def _pose(street: Street, t: float) -> dict:
    position, yaw = street.ego_pose(t)
    return {
        "accel": _acceleration(street, t),
        "orientation": yaw_quaternion(yaw),
        "pos": position.tolist(),
        "rotation_rate": [0.0, 0.0, _turn_rate(street, t)],
        "utime": 0,
        "vel": [street.ego.speed_at(t), 0.0, 0.0],
    }


def _imu(street: Street, t: float) -> dict:
    return {
        "linear_accel": _acceleration(street, t),
        "q": yaw_quaternion(street.ego_pose(t)[1]),
        "rotation_rate": [0.0, 0.0, _turn_rate(street, t)],
        "utime": 0,
    }


def _steering(street: Street, t: float) -> dict:
    return {"utime": 0, "value": float(np.arctan(_WHEEL_BASE * street.road.curvature) * _STEERING_RATIO)}


def _pedals(street: Street, t: float) -> dict:
    return {"brake_sensor": 0.17, "steering_sensor": 0.2, "throttle_sensor": 0.2, "utime": 0}


def _monitor(street: Street, t: float) -> dict:
    return {
        "available_distance": 100,
        "battery_level": 80,
        "brake": 0,
        "brake_switch": 1,
        "gear_position": 7,
        "left_signal": 0,
        "rear_left_rpm": 0.0,
        "rear_right_rpm": 0.0,
        "right_signal": 0,
        "steering": 0.0,
        "steering_speed": 0.0,
        "throttle": 100,
        "utime": 0,
        "vehicle_speed": street.ego.speed_at(t) * 3.6,
        "yaw_rate": float(np.rad2deg(_turn_rate(street, t))),
    }


def _wheels(street: Street, t: float) -> dict:
    rpm = street.ego.speed_at(t) / (2 * np.pi * _WHEEL_RADIUS) * 60
    return {
        **{f"{corner}_wheel_speed": rpm for corner in ("FL", "FR", "RL", "RR")},
        "left_solar": 0,
        "longitudinal_accel": street.ego.acceleration,
        "meanEffTorque": 0.0,
        "odom": 0.0,
        "odom_speed": street.ego.speed_at(t) * 3.6,
        "pedal_cc": 0,
        "regen": 0,
        "requestedTorqueAfterProc": 0.0,
        "right_solar": 0,
        "steer_corrected": 0.0,
        "steer_offset_can": 0.0,
        "steer_raw": 0.0,
        "transversal_accel": 0.0,
        "utime": 0,
    }


_STREAMS = {
    "pose": (50, _pose),
    "ms_imu": (100, _imu),
    "steeranglefeedback": (100, _steering),
    "vehicle_monitor": (2, _monitor),
    "zoesensors": (100, _pedals),
    "zoe_veh_info": (100, _wheels),
}
"""Messages per second, and the function that returns a message."""
