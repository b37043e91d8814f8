"""Options of clients that are known to leave alone which data they show.

A store that was made with any other option has no name: it may select the data, and so may one that a later
version of the client adds. Of each client it is listed what says who asks, how patiently, by which way, and
how values are written. A proxy is such a way, as a name server is: it is to pass on what the server says, and
environment variables may set one all the same.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import TYPE_CHECKING, Any, Final

from zcache._source import endpoints
from zcache._source.answers import UnnamedError
from zcache._source.urls import check_query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_HEADER: Final = re.compile(
    "(proxy-)?authorization|user-agent|referer|pragma|cache-control|traceparent|tracestate"
    "|(x-)?api-?key|x-(amz|goog|ms)-.*-token|x-goog-api-key|x-goog-user-project|x-amz-request-payer"
    "|(x-|private-|x-auth-|x-access-|x-api-|deploy-|job-)?token",
    re.IGNORECASE,
)
"""Headers of a request that say who asks. `Accept` and its like select one of several representations."""
_ANY: Final = (("accept", "*/*"), ("accept-encoding", "identity"))
"""Headers with values that select none."""
_AIOHTTP: Final = frozenset(
    {
        *("auth", "conn_timeout", "loop", "max_field_size", "max_headers", "max_line_size"),
        *("proxy", "proxy_auth", "raise_for_status", "read_bufsize", "read_timeout"),
        *("requote_redirect_url", "skip_auto_headers", "ssl", "timeout", "trust_env", "verify_ssl"),
    }
)
_FSSPEC: Final = frozenset(
    {
        *("asynchronous", "batch_size", "listings_expiry_time", "loop", "max_paths"),
        *("skip_instance_cache", "use_listings_cache"),
    }
)
_HTTP: Final = (
    _FSSPEC
    | _AIOHTTP
    | {
        *("block_size", "cache_options", "cache_type", "client_kwargs", "cookies", "encoded"),
        *(
            "get_client",
            "headers",
            "params",
            "proxy_headers",
            "same_scheme",
            "simple_links",
            "size_policy",
        ),
    }
)
_S3FS: Final = _FSSPEC | {
    *("anon", "cache_regions", "client_kwargs", "config_kwargs", "default_block_size"),
    *("default_cache_type", "default_fill_cache", "endpoint_url", "fixed_upload_size", "key"),
    *("local_expiry_check", "max_concurrency", "password", "profile", "requester_pays"),
    *("s3_additional_kwargs", "secret", "session", "token", "use_ssl", "username"),
    # Which version is read, the path says.
    "version_aware",
}
_S3FS_CLIENT: Final = frozenset(
    {
        *("api_version", "aws_access_key_id", "aws_account_id", "aws_secret_access_key"),
        *("aws_session_token", "endpoint_url", "region_name", "use_ssl", "verify"),
    }
)
_S3FS_CONFIG: Final = frozenset(
    {
        *("account_id_endpoint_mode", "auth_scheme_preference", "client_cert", "connect_timeout"),
        *("connector_args", "defaults_mode", "disable_request_compression"),
        *("endpoint_discovery_enabled", "ignore_configured_endpoint_urls", "inject_host_prefix"),
        *("max_pool_connections", "parameter_validation", "proxies", "proxies_config"),
        *("read_timeout", "region_name", "request_checksum_calculation"),
        *("request_min_compression_size_bytes", "response_checksum_validation", "retries", "s3"),
        *("s3_disable_express_session_auth", "signature_version", "sigv4a_signing_region_set"),
        *("tcp_keepalive", "use_dualstack_endpoint", "use_fips_endpoint", "user_agent"),
        *("user_agent_appid", "user_agent_extra", "warm_up_loader_caches"),
    }
)
_S3FS_CONNECTOR: Final = frozenset(
    {
        *("force_close", "keepalive_timeout", "pool_timeout", "ssl_context", "ttl_dns_cache"),
        *("use_dns_cache", "write_timeout"),
    }
)
_S3FS_SERVICE: Final = frozenset(
    {
        # Of one server, which the endpoint names, both styles are the same bucket.
        "addressing_style",
        *("payload_signing_enabled", "us_east_1_regional_endpoint", "use_accelerate_endpoint"),
        *("use_arn_region", "use_dualstack_endpoint"),
    }
)
_S3FS_CALLS: Final = frozenset(
    {
        *("ACL", "BucketKeyEnabled", "CacheControl", "ChecksumAlgorithm", "ChecksumMode"),
        *("ContentDisposition", "ContentEncoding", "ContentLanguage", "ContentType"),
        *("ExpectedBucketOwner", "GrantFullControl", "GrantRead", "GrantReadACP", "GrantWriteACP"),
        *("Metadata", "RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey"),
        *("SSECustomerKeyMD5", "SSEKMSEncryptionContext", "SSEKMSKeyId", "ServerSideEncryption"),
        *("StorageClass", "Tagging"),
    }
)
_GCSFS: Final = _FSSPEC | {
    *("access", "block_size", "cache_timeout", "check_connection", "consistency"),
    *("default_location", "endpoint_url", "finalize_on_close", "max_mrd_pool_cache_queue_size"),
    *("memmove_max_workers", "mrd_pool_cache_size", "project", "requester_pays"),
    *("requests_timeout", "retry_initial", "retry_maximum", "retry_multiplier", "retry_timeout"),
    *("secure_serialize", "session_kwargs", "timeout", "token", "user_project"),
    "version_aware",
}
_ADLFS: Final = _FSSPEC | {
    *("account_host", "account_key", "account_name", "anon", "assume_container_exists"),
    *("blocksize", "client_id", "client_secret", "connection_string", "connection_timeout"),
    *("credential", "default_cache_type", "default_fill_cache", "location_mode"),
    *("max_concurrency", "read_timeout", "sas_token", "socket_timeout", "tenant_id", "timeout"),
    "version_aware",
}
_OBSTORE: Final = {
    "S3Store": frozenset(
        {
            *("access_key_id", "bucket", "checksum_algorithm", "conditional_put"),
            *("container_authorization_token_file", "container_credentials_full_uri"),
            *("container_credentials_relative_uri", "copy_if_not_exists", "default_region"),
            *("disable_bulk_delete", "disable_tagging", "endpoint", "endpoint_url_s3"),
            *("imdsv1_fallback", "metadata_endpoint", "region", "request_payer", "role_arn"),
            *("role_session_name", "s3_express", "secret_access_key", "server_side_encryption"),
            *("session_token", "skip_signature", "sse_bucket_key_enabled"),
            *("sse_customer_key_base64", "sse_kms_key_id", "sts_endpoint", "token"),
            *("unsigned_payload", "virtual_hosted_style_request", "web_identity_token_file"),
        }
    ),
    "GCSStore": frozenset(
        {
            *("application_credentials", "base_url", "bearer_token", "bucket"),
            *("service_account", "service_account_key", "service_account_path", "skip_signature"),
        }
    ),
    "AzureStore": frozenset(
        {
            *("account_key", "account_name", "authority_host", "bearer_token", "client_id"),
            *("client_secret", "container_name", "credential_type", "disable_tagging"),
            *("encryption_key", "endpoint", "fabric_cluster_identifier", "fabric_session_token"),
            *("fabric_token_service_url", "fabric_workload_host", "federated_token_file"),
            *("msi_endpoint", "msi_resource_id", "object_id", "sas_key"),
            *("skip_signature", "tenant_id", "token", "use_azure_cli", "use_emulator"),
            "use_fabric_endpoint",
        }
    ),
}
_OBSTORE_CLIENT: Final = frozenset(
    {
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type"),
        *("default_headers", "http1_only", "http2_keep_alive_interval"),
        *("http2_keep_alive_timeout", "http2_keep_alive_while_idle", "http2_max_frame_size"),
        *("http2_only", "pool_idle_timeout", "pool_max_idle_per_host", "proxy_ca_certificate"),
        *("proxy_excludes", "proxy_url", "randomize_addresses", "read_timeout"),
        *("root_certificate", "timeout", "user_agent"),
    }
)


def check_filesystem(protocol: str | None, filesystem: Any) -> None:
    """See that a file system of fsspec was made with no option that may select data.

    Parameters
    ----------
    protocol : str or None
        Which one it is.
    filesystem : AbstractFileSystem
        The file system.

    Raises
    ------
    UnnamedError
        If one is not known.
    """
    if protocol in _CHECKS:
        _CHECKS[protocol](filesystem)


def check_bucket(bucket: Any) -> None:
    """The same of a store of obstore."""
    kind = type(bucket).__name__
    if kind in _OBSTORE:
        made = endpoints.settings(bucket)
        _check(made, _OBSTORE[kind])
        # It is added to each request.
        check_query(made.get("sas_key", "").removeprefix("?"))
        if kind == "S3Store":
            endpoints.check_style_of_obstore_s3(made)
    elif kind != "HTTPStore":
        return
    client = bucket.client_options or {}
    _check(client, _OBSTORE_CLIENT)
    _check_headers(client.get("default_headers") or {})


def _check_http(filesystem: Any) -> None:
    # Found where its file system is.
    usual = importlib.import_module("fsspec.implementations.http").get_client
    # A URL that counts as encoded is asked for in another way.
    if filesystem.get_client is not usual or filesystem.encoded:
        raise UnnamedError
    _check(_given(filesystem), _HTTP)
    _check_aiohttp(filesystem.client_kwargs)
    _check_aiohttp(filesystem.kwargs)


def _check_s3fs(filesystem: Any) -> None:
    _check(_given(filesystem), _S3FS)
    _check(filesystem.client_kwargs, _S3FS_CLIENT)
    _check(filesystem.s3_additional_kwargs, _S3FS_CALLS)
    config = filesystem.config_kwargs
    _check(config, _S3FS_CONFIG)
    _check(config.get("connector_args") or (), _S3FS_CONNECTOR)
    _check(config.get("s3") or (), _S3FS_SERVICE)


def _check_gcsfs(filesystem: Any) -> None:
    _check(_given(filesystem), _GCSFS)
    _check_aiohttp(filesystem.session_kwargs)


def _check_adlfs(filesystem: Any) -> None:
    _check(_given(filesystem), _ADLFS)
    # A shared access signature is sent as it is.
    check_query(filesystem.service_client.url.partition("?")[2])


_CHECKS: Final = {
    "http": _check_http,
    "s3": _check_s3fs,
    "gs": _check_gcsfs,
    "az": _check_adlfs,
}


def _given(filesystem: Any) -> Iterator[str]:
    """Names of the options that a file system of fsspec was made with."""
    yield from filesystem.storage_options
    count = len(filesystem.storage_args)
    if not count:
        return
    for kind in type(filesystem).__mro__:
        # Some pass on all to the next class.
        if (init := vars(kind).get("__init__")) and (
            names := inspect.getfullargspec(init).args[1:]
        ):
            yield from names[:count]
            return
    raise UnnamedError


def _check(names: Iterable[str], known: frozenset[str]) -> None:
    if not known.issuperset(names):
        raise UnnamedError


def _check_aiohttp(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in ("headers", "proxy_headers"):
            _check_headers(value or {})
        elif name == "params":
            check_query("&".join(f"{each}=" for each in value))
        elif name not in _AIOHTTP and not (name == "cookies" and not value):
            raise UnnamedError


def _check_headers(headers: Any) -> None:
    for name, value in headers.items():
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        if (name.lower(), text) not in _ANY and not _HEADER.fullmatch(name):
            raise UnnamedError
