"""The server and the account that a client really uses: asked of the client, its profile, the environment.

Each function raises where the answer is not certain. A server that a library finds by default has no
name of its own, so that all who use it agree.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import weakref
from pathlib import Path
from typing import Any, Final

from zcache._source.answers import UnnamedError, ask
from zcache._source.urls import server

_AMAZON: Final = re.compile(
    r"https?://s3([.-](accelerate|dualstack|external-1|fips|[a-z]{2}(-[a-z]+)+-\d+))*\.amazonaws\.com(\.cn)?"
)
_GOOGLE: Final = re.compile(r"https?://storage(\.mtls)?\.googleapis\.com")
_OWN_DOMAIN: Final = re.compile("(us|eu)-iso|eusc-")
"""Regions with servers in another domain than Amazon's own."""


def amazon(url: str) -> str | None:
    """A server of S3; None for Amazon's, where a bucket has the same contents in every region."""
    if not _AMAZON.fullmatch(url):
        return url
    if url.endswith(".cn"):
        return "aws-cn"
    return "aws-us-gov" if "us-gov-" in url else None


def amazon_of(region: object) -> str | None:
    """Amazon's server in a region, as `amazon` tells it."""
    text = region if isinstance(region, str) else ""
    if _OWN_DOMAIN.match(text):
        raise UnnamedError
    if text.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if text.startswith("us-gov-") else None


def of_s3fs(filesystem: Any) -> str | None:
    """The server of `s3fs.S3FileSystem`, which finds it with botocore when it first connects."""
    if filesystem._s3 is not None:
        return amazon(server(filesystem._s3.meta.endpoint_url))
    options, config = filesystem.client_kwargs, filesystem.config_kwargs
    given = {url for url in (filesystem.endpoint_url, options.get("endpoint_url")) if url}
    if len(given) > 1 or not set(filesystem.kwargs) <= {"profile"}:
        raise UnnamedError
    if given:
        return amazon(server(given.pop()))
    session = filesystem.session
    if session is None:
        # Found where s3fs is.
        botocore = importlib.import_module("botocore.session")
        session = botocore.Session(profile=filesystem.kwargs.get("profile"))
    if session.get_default_client_config() is not None:
        raise UnnamedError
    ignored = config.get("ignore_configured_endpoint_urls")
    if ignored is None:
        ignored = session.get_config_variable("ignore_configured_endpoint_urls")
    if not ignored and (url := _configured(session)):
        return amazon(server(url))
    region = options.get("region_name") or config.get("region_name")
    return amazon_of(region or session.get_config_variable("region"))


def _configured(session: Any) -> str | None:
    """What environment and profile say, in the order of the AWS SDKs' "service-specific endpoints"."""
    profile = session.get_scoped_config()
    of_services = {}
    if (services := profile.get("services")) is not None:
        of_services = session.full_config["services"][services]
    candidates = (
        os.environ.get("AWS_ENDPOINT_URL_S3"),
        os.environ.get("AWS_ENDPOINT_URL"),
        of_services.get("s3", {}).get("endpoint_url"),
        profile.get("endpoint_url"),
    )
    return next((url for url in candidates if url), None)


def of_gcsfs(filesystem: Any) -> str | None:
    """The server of `gcsfs.GCSFileSystem`: its option, an emulator of the environment, or Google's."""
    return _google(server(filesystem._location))


def _google(url: str) -> str | None:
    return None if _GOOGLE.fullmatch(url) else url


def of_adlfs(filesystem: Any) -> str:
    """The server of `adlfs.AzureBlobFileSystem`; its name or path has the account.

    The account may be an option, in a connection string or in the environment: the client knows which.
    """
    # All of its query is a shared access signature, which it sends after the path.
    return server(filesystem.service_client.url.partition("?")[0])


def settings(store: Any) -> dict[str, str]:
    """Configuration of a store of obstore, with what its provider of credentials adds.

    Raises
    ------
    UnnamedError
        If the two contradict each other.
    """
    made = {str(name): str(value) for name, value in dict(_config(store)).items()}
    provider = store.credential_provider
    for name, value in dict(getattr(provider, "config", None) or {}).items():
        if made.setdefault(str(name).lower(), str(value)) != str(value):
            raise UnnamedError
    if (getattr(provider, "prefix", None) or store.prefix) != store.prefix:
        raise UnnamedError
    return made


_silent: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
"""Stores of obstore that have not told their configuration."""


def _config(store: Any) -> Any:
    # It panics where a setting of its client is among the arguments, and writes so to standard error each time.
    if _silent.get(id(store)) is store:
        raise UnnamedError
    config = ask(lambda: store.config or {})
    if config is None:
        _silent[id(store)] = store
        raise UnnamedError
    return config


def setting(made: dict[str, str], name: str, *variables: str) -> str | None:
    """One option of obstore: given, or from the environment, of which all variables have to agree."""
    if name in made:
        return made[name]
    environment = os.environ.items()
    found = {value for given, value in environment if value and _as_read(given) in variables}
    if len(found) > 1:
        raise UnnamedError
    return found.pop() if found else None


def _is_on(made: dict[str, str], name: str, *variables: str) -> bool:
    """Whether a setting may be true."""
    return (setting(made, name, *variables) or "false").lower() not in ("false", "0", "f", "no")


def _as_read(variable: str) -> str:
    """A variable as obstore knows it, which takes no notice of the case of what follows the prefix of a provider."""
    prefix, _, name = variable.partition("_")
    return f"{prefix}_{name.upper()}" if prefix in ("AWS", "AZURE", "GOOGLE") else variable


def of_obstore_s3(made: dict[str, str]) -> str | None:
    """The server of `obstore.store.S3Store`."""
    given = _given_to_s3(made)
    if len(given) > 1:
        raise UnnamedError
    if given:
        return amazon(server(given.pop()))
    region = setting(made, "region", "AWS_REGION")
    return amazon_of(region or setting(made, "default_region", "AWS_DEFAULT_REGION"))


def _given_to_s3(made: dict[str, str]) -> set[str]:
    found = (
        setting(made, "endpoint", "AWS_ENDPOINT", "AWS_ENDPOINT_URL"),
        setting(made, "endpoint_url_s3", "AWS_ENDPOINT_URL_S3"),
    )
    return {url for url in found if url is not None}


def check_style_of_obstore_s3(made: dict[str, str]) -> None:
    """See that the bucket is a part of what is asked for.

    Raises
    ------
    UnnamedError
        If it may have to be in the endpoint that was given, or is nowhere.
    """
    is_by_host = _is_on(made, "virtual_hosted_style_request", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
    if is_by_host and _given_to_s3(made):
        raise UnnamedError


def of_obstore_google(made: dict[str, str]) -> str | None:
    """The server of `obstore.store.GCSStore`, which a service account may name as well."""
    if url := setting(made, "base_url", "GOOGLE_BASE_URL"):
        return _google(server(url))
    accounts = [setting(made, "service_account_key", "GOOGLE_SERVICE_ACCOUNT_KEY")]
    accounts += [
        Path(path).read_text(encoding="utf-8")
        for path in (
            setting(
                made,
                "service_account",
                *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT"),
            ),
            setting(made, "application_credentials", "GOOGLE_APPLICATION_CREDENTIALS"),
        )
        if path
    ]
    urls = {json.loads(account).get("gcs_base_url") for account in accounts if account} - {None}
    if len(urls) > 1:
        raise UnnamedError
    return _google(server(urls.pop())) if urls else None


def of_obstore_azure(made: dict[str, str]) -> str:
    """The server of `obstore.store.AzureStore`; its name or path has the account."""
    for name in ("use_emulator", "use_fabric_endpoint"):
        variables = (f"AZURE_STORAGE_{name.upper()}", f"AZURE_{name.upper()}")
        if _is_on(made, name, *variables):
            raise UnnamedError
    if url := setting(made, "endpoint", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"):
        return server(url)
    account = setting(made, "account_name", "AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise UnnamedError
    return server(f"https://{account}.blob.core.windows.net")
