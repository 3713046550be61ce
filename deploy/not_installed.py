"""What `pip install .` asks for a package: there is none.

Installed, the lab's module would be a `crypto` for all programs of that Python, and the group's
file, which belongs beside it, lie among their packages.
"""

raise SystemExit(
    "secure_mqtt_client.py is not to be installed: it runs from its folder. Install what it needs"
    " (pip install -r requirements.txt), then run: python3 secure_mqtt_client.py --help"
)
