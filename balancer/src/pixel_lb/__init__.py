"""The agent of a Pixel Endpoint balancer: it selects backends and writes Nginx's upstreams.

Ansible installs it as one zipapp, `/usr/local/sbin/pixel-lb`. It uses only the standard library, except for
`cloudwatch`, which needs boto3 and runs only if CPU credits are queried.
"""
