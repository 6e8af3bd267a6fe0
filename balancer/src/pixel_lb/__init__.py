"""The agent of a Pixel Endpoint balancer: it writes Nginx' upstreams and decides which backends are in them.

Ansible installs it as one zipapp, `/usr/local/sbin/pixel-lb`. Only the standard library is used, except in
`cloudwatch`, which needs boto3 and runs only where CPU credits are asked for.
"""
