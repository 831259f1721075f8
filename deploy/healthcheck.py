"""`python healthcheck.py`: exit status 0 when the server of this container answers /ready with 200, else 1.

The image has no curl. The address is the server's own: SPQ_PORT, and HTTPS where SPQ_TLS_CERT is set; the certificate
is made for another name than the loopback's, so it is not checked.
"""

from __future__ import annotations

import http.client
import os
import ssl
import sys
import urllib.request

TIMEOUT_S = 4


def main() -> int:
    """Ask once."""
    scheme = "https" if os.environ.get("SPQ_TLS_CERT") else "http"
    context = ssl._create_unverified_context() if scheme == "https" else None
    url = f"{scheme}://127.0.0.1:{os.environ.get('SPQ_PORT', '8000')}/ready"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with direct.open(url, timeout=TIMEOUT_S) as answer:
            print(answer.read().decode())
    except (OSError, http.client.HTTPException) as error:  # an OSError too: HTTPError, which is /ready's 503
        print(f"{url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
