"""The interactive documentation, with all its files."""

import re
from base64 import b64encode
from hashlib import sha256

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from pixel.routes.live import SECURITY

router = APIRouter(include_in_schema=False)

router.mount("/docs/static", StaticFiles(packages=[("fastapi_swagger", "resources")]))


_PAGE = get_swagger_ui_html(
    openapi_url="/openapi.json",
    title="Pixel Endpoint",
    swagger_js_url="/docs/static/swagger-ui-bundle.js",
    swagger_css_url="/docs/static/swagger-ui.css",
    swagger_favicon_url="/docs/static/favicon-32x32.png",
).body


def _policy(page: bytes) -> str:
    """A policy that allows the page's own inline script, by its hash, and no other."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = "".join(f" 'sha256-{b64encode(sha256(text).digest()).decode()}'" for text in scripts)
    return (
        f"default-src 'none'; script-src 'self'{hashes}; style-src 'self' 'unsafe-inline';"
        " img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


_HEADERS = SECURITY | {"Content-Security-Policy": _policy(bytes(_PAGE))}


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Swagger UI."""
    return HTMLResponse(bytes(_PAGE), headers=_HEADERS)
