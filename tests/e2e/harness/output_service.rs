//! An output service on an ordinary directory: what Bazel stages is written at once, and Bazel hashes it itself. The
//! messages have what of the protocol (`bazel_output_service.BazelOutputService`) it looks at.

use std::{
    convert::Infallible,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    task::{Context, Poll},
};

use futures::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::cache::Store;
use prost::Message;
use prost_types::Any;
use tokio::runtime::Runtime;
use tonic::{
    Status,
    body::Body,
    server::{Grpc, NamedService},
};
use tonic_prost::ProstCodec;

use super::{cache::Cache, scratch::Scratch};

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
struct Started {
    #[prost(string, tag = "2")]
    output_path_suffix: String,
}

#[derive(Clone, PartialEq, Message)]
struct Artifact {
    #[prost(string, tag = "1")]
    path: String,
    #[prost(message, optional, tag = "2")]
    locator: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Artifacts {
    #[prost(message, repeated, tag = "2")]
    artifacts: Vec<Artifact>,
}

/// A `FileArtifactLocator`, whose digest is the Remote Execution API's.
#[derive(Clone, PartialEq, Message)]
struct Locator {
    #[prost(message, optional, tag = "1")]
    digest: Option<Sum>,
}

#[derive(Clone, PartialEq, Message)]
struct Sum {
    #[prost(string, tag = "1")]
    hash: String,
    #[prost(uint64, tag = "2")]
    size: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Staged {
    #[prost(message, repeated, tag = "1")]
    responses: Vec<StagedOne>,
}

#[derive(Clone, PartialEq, Message)]
struct StagedOne {
    /// An empty `google.rpc.Status` is a good one.
    #[prost(message, optional, tag = "1")]
    status: Option<Nothing>,
}

#[derive(Clone, PartialEq, Message)]
struct Paths {
    #[prost(string, repeated, tag = "2")]
    paths: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Stats {
    #[prost(message, repeated, tag = "1")]
    responses: Vec<StatOne>,
}

#[derive(Clone, PartialEq, Message)]
struct StatOne {
    #[prost(message, optional, tag = "1")]
    stat: Option<Stat>,
}

/// One of these.
#[derive(Clone, PartialEq, Message)]
struct Stat {
    #[prost(message, optional, tag = "1")]
    file: Option<Nothing>,
    #[prost(message, optional, tag = "2")]
    symlink: Option<Link>,
    #[prost(message, optional, tag = "3")]
    directory: Option<Nothing>,
}

#[derive(Clone, PartialEq, Message)]
struct Link {
    #[prost(string, tag = "1")]
    target: String,
}

/// The directory that `bazel-out` leads to.
const SUFFIX: &str = "tree";

#[derive(Clone)]
struct Service {
    tree: Arc<Path>,
    store: Store,
}

impl Service {
    fn clean(&self) -> Nothing {
        let _ = std::fs::remove_dir_all(&self.tree);
        Nothing {}
    }

    fn start(&self) -> Started {
        std::fs::create_dir_all(&self.tree).unwrap();
        let output_path_suffix = SUFFIX.to_owned();
        Started { output_path_suffix }
    }

    fn stage(&self, staged: &Artifacts) -> Staged {
        for artifact in &staged.artifacts {
            let locator = artifact.locator.clone().unwrap();
            let sum = Locator::decode(&*locator.value).unwrap().digest.unwrap();
            let digest = Digest::from_hex(Some(DigestFunction::Sha256), &sum.hash, sum.size).unwrap();
            let path = self.tree.join(&artifact.path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = std::fs::remove_file(&path);
            let bytes = self.store.get(&digest).unwrap_or_default();
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o555)).unwrap();
        }
        let one = StagedOne {
            status: Some(Nothing {}),
        };
        Staged {
            responses: vec![one; staged.artifacts.len()],
        }
    }

    fn stat(&self, path: &str) -> StatOne {
        let path = self.tree.join(path);
        let stat = path.symlink_metadata().ok().map(|seen| Stat {
            file: seen.is_file().then_some(Nothing {}),
            symlink: seen.is_symlink().then(|| Link {
                target: std::fs::read_link(&path).unwrap().display().to_string(),
            }),
            directory: seen.is_dir().then_some(Nothing {}),
        });
        StatOne { stat }
    }
}

impl NamedService for Service {
    const NAME: &'static str = "bazel_output_service.BazelOutputService";
}

impl tower::Service<Request<Body>> for Service {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        let method = request
            .uri()
            .path()
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        match method.as_str() {
            "Clean" => answer(request, move |_: Nothing| this.clean()),
            "StartBuild" => answer(request, move |_: Nothing| this.start()),
            "StageArtifacts" => answer(request, move |staged| this.stage(&staged)),
            "BatchStat" => answer(request, move |asked: Paths| Stats {
                responses: asked.paths.iter().map(|path| this.stat(path)).collect(),
            }),
            "FinalizeArtifacts" | "FinalizeBuild" => answer(request, |_: Nothing| Nothing {}),
            other => {
                let response = Status::unimplemented(other.to_owned()).into_http();
                std::future::ready(Ok(response)).boxed()
            }
        }
    }
}

/// Answers one call.
fn answer<Q: Message + Default + 'static, A: Message + Default + 'static>(
    request: Request<Body>,
    make: impl Fn(Q) -> A + Clone + Send + Sync + 'static,
) -> BoxFuture<'static, Result<Response<Body>, Infallible>> {
    let service = tower::service_fn(move |asked: tonic::Request<Q>| {
        let answer = make(asked.into_inner());
        async move { Ok::<_, Status>(tonic::Response::new(answer)) }
    });
    async move {
        let codec = ProstCodec::<A, Q>::default();
        Ok(Grpc::new(codec).unary(service, request).await)
    }
    .boxed()
}

/// An output service that runs. It ends when this is dropped.
pub(crate) struct OutputService {
    url: String,
    dir: Scratch,
    _runtime: Runtime,
}

impl OutputService {
    /// One that has its blobs from the library's own cache.
    pub(crate) fn start(cache: &Cache) -> Self {
        let dir = Scratch::new("output-service");
        let service = Service {
            tree: dir.join(SUFFIX).into(),
            store: cache.embedded().store().clone(),
        };
        let runtime = Runtime::new().unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let url = format!("grpc://{}", listener.local_addr().unwrap());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(incoming));
        Self {
            url,
            dir,
            _runtime: runtime,
        }
    }

    /// The build tool's flags that use it.
    pub(crate) fn flags(&self) -> [String; 2] {
        let name = "--experimental_remote_output_service";
        [
            format!("{name}={}", self.url),
            format!("{name}_output_path_prefix={}", self.dir.path().display()),
        ]
    }

    /// What it has.
    pub(crate) fn tree(&self) -> PathBuf {
        self.dir.join(SUFFIX)
    }
}
