//! What every service of the cache shares: the content, the settings, and the checks at the beginning of a call.

use std::{future::pending, sync::Arc, time::Duration};

use bazel_remote_apis::{
    build::bazel::remote::execution::v2 as reapi,
    google::{protobuf::Any, rpc},
};
use http::HeaderMap;
use parking_lot::RwLock;
use prost::Message as _;
use tonic::{Code, Request, Status};

use super::{
    faults::{Faults, RequestFault},
    resource::Resource,
    stats::{Counters, Rpc, add},
    store::Store,
    upload::Uploads,
};
use outhaul_digest::{Digest, DigestFunction};

/// Shared by the services.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) store: Store,
    pub(super) faults: Faults,
    pub(super) counters: Counters,
    pub(super) uploads: Uploads,
    /// Functions that requests may use.
    pub(super) functions: Vec<DigestFunction>,
    /// The only instance name that requests may carry, unless any will do.
    pub(super) instance: Option<String>,
    /// Whether zstd is offered and taken.
    pub(super) zstd: bool,
    /// Largest sum of blob sizes in a batch; 0 for no limit.
    pub(super) max_batch_bytes: u64,
    /// Name (lowercase) and value of the header that every call must carry.
    pub(super) required_header: RwLock<Option<(String, String)>>,
    /// Headers of the last call, for tests of what a client sends.
    pub(super) last_headers: RwLock<HeaderMap>,
}

/// A handle for the services.
pub(super) type Shared = Arc<Context>;

impl Context {
    /// Lets a call in: counts it, checks its header, and applies the faults for calls.
    pub(super) async fn enter<T>(&self, rpc: Rpc, request: &Request<T>) -> Result<(), Status> {
        self.counters.call(rpc);
        let headers = request.metadata();
        self.last_headers.write().clone_from(headers.as_ref());
        if let Some((name, value)) = &*self.required_header.read()
            && !headers
                .as_ref()
                .get_all(name)
                .iter()
                .any(|given| given.as_bytes() == value.as_bytes())
        {
            add(&self.counters.unauthenticated, 1);
            return Err(Status::unauthenticated(format!(
                "header {name:?} is missing or wrong"
            )));
        }
        let (delay, outcome) = self.faults.on_request(rpc);
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        match outcome {
            Some(RequestFault::Status(code)) => Err(injected(code)),
            Some(RequestFault::RetryAfter(patience)) => Err(busy(patience)),
            Some(RequestFault::Stall) => pending().await,
            // The rest is done on the wire.
            Some(_) | None => Ok(()),
        }
    }

    /// Checks the instance name.
    pub(super) fn check_instance(&self, name: &str) -> Result<(), Status> {
        match &self.instance {
            Some(expected) if expected != name => Err(Status::invalid_argument(format!(
                "unknown instance name {name:?}, this cache has {expected:?}"
            ))),
            _ => Ok(()),
        }
    }

    /// Reads a digest of a request, whose own field names the function or leaves it to the hash's length.
    pub(super) fn digest(&self, digest: Option<&reapi::Digest>, function: i32) -> Result<Digest, Status> {
        let Some(digest) = digest else {
            return Err(Status::invalid_argument("digest is missing"));
        };
        let function = match function {
            0 => None,
            named => Some(DigestFunction::from_wire(named).ok_or_else(|| {
                Status::invalid_argument(format!("digest function number {named} is not supported"))
            })?),
        };
        let size = u64::try_from(digest.size_bytes)
            .map_err(|_| Status::invalid_argument(format!("size {} is negative", digest.size_bytes)))?;
        self.checked(function, &digest.hash, size)
    }

    /// Reads the digest in a resource name, and checks its instance and compression.
    pub(super) fn resource(&self, resource: &Resource<'_>) -> Result<Digest, Status> {
        self.check_instance(resource.instance)?;
        if resource.compressed && !self.zstd {
            return Err(Status::invalid_argument("compressor zstd is not offered"));
        }
        if let Some(function) = resource.function.filter(|function| !function.is_named()) {
            return Err(Status::invalid_argument(format!(
                "digest function {function} must be omitted from resource names"
            )));
        }
        self.checked(resource.function, resource.hash, resource.size)
    }

    fn checked(&self, function: Option<DigestFunction>, hash: &str, size: u64) -> Result<Digest, Status> {
        if hash.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(Status::invalid_argument(format!(
                "hash {hash:?} is not lowercase"
            )));
        }
        // Functions that must be named are never meant by a hash's length alone.
        let digest = Digest::from_hex(function, hash, size)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if self.functions.contains(&digest.function()) {
            Ok(digest)
        } else {
            Err(Status::invalid_argument(format!(
                "digest function {} is not supported here",
                digest.function()
            )))
        }
    }

    /// Checks the sum of a batch's sizes.
    pub(super) fn check_batch(&self, total: u64) -> Result<(), Status> {
        if self.max_batch_bytes > 0 && total > self.max_batch_bytes {
            return Err(Status::invalid_argument(format!(
                "batch of {total} bytes exceeds the limit of {} bytes",
                self.max_batch_bytes
            )));
        }
        Ok(())
    }
}

/// The status of a fault.
pub(super) fn injected(code: Code) -> Status {
    Status::new(code, "injected fault")
}

/// `google.rpc.RetryInfo`, which `bazel-remote-apis` does not have.
#[derive(Clone, PartialEq, prost::Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<prost_types::Duration>,
}

/// RESOURCE_EXHAUSTED, with the wish that it be tried again after this time.
pub(super) fn inner_busy(patience: Duration) -> rpc::Status {
    let info = RetryInfo {
        // No test waits for longer than that can hold.
        retry_delay: prost_types::Duration::try_from(patience).ok(),
    };
    rpc::Status {
        code: Code::ResourceExhausted.into(),
        message: "injected fault: busy".to_owned(),
        details: vec![Any {
            type_url: "type.googleapis.com/google.rpc.RetryInfo".to_owned(),
            value: info.encode_to_vec(),
        }],
    }
}

/// The same as the status of a call.
pub(super) fn busy(patience: Duration) -> Status {
    let inner = inner_busy(patience);
    let details = inner.encode_to_vec().into();
    Status::with_details(Code::ResourceExhausted, inner.message, details)
}

/// A status inside a batch's answer.
pub(super) fn inner_status(code: Code, message: impl Into<String>) -> rpc::Status {
    rpc::Status {
        code: code.into(),
        message: message.into(),
        details: Vec::new(),
    }
}
