"""All that touches torch's private side: products, graphs, transforms, isolation, containers.

The only folder that uses names which torch does not document; it may import `_errors` only.
"""
