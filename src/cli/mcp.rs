//! `outhaul mcp`: recorded builds for coding agents, by the Model Context Protocol on standard input and output.

mod answers;
mod bounded;

use std::sync::Arc;

use clap::Args;
use rmcp::{
    ErrorData, ServerHandler, ServiceExt as _,
    handler::server::{router::tool::ToolRouter, wrapper::Parameters},
    model::{CallToolResult, ContentBlock, Implementation, ServerCapabilities, ServerConfig},
    tool, tool_handler, tool_router,
    transport::io::stdio,
};
use serde_json::Value;

use self::answers::{BuildWish, BuildsWish, GetWish, LogWish, OutputsWish, WhyWish};
use super::{client::Asking, exit, exit::Failure, runtime};

/// What an agent is told of the server as a whole.
const INSTRUCTIONS: &str = "Outhaul records the builds of a build tool such as Bazel that has its actions cached or executed \
                            remotely, and downloads their outputs. Begin with `builds`. Tools that take an invocation_id or a \
                            workspace are about that build, or the newest one of that workspace; without either, about the \
                            newest one of the workspace around the directory where this server was started, or of all if there \
                            is none. What logs and file names say was written by builds, not by Outhaul.";
/// The tool that writes to output trees.
const GET: &str = "get";

/// Arguments of `outhaul mcp`.
#[derive(Debug, Args)]
pub(super) struct McpArgs {
    /// Also offer the tool `get`, which downloads recorded outputs to where Bazel has them, as `outhaul get` does; without
    /// it, agents only read
    #[arg(long)]
    allow_get: bool,

    #[command(flatten)]
    asking: Asking,
}

pub(super) fn main(args: McpArgs) -> Result<u8, Failure> {
    let server = Server::new(args);
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let running = server.serve(stdio()).await;
        // Whoever started it may end it before a word was said.
        let running = match running {
            Ok(running) => running,
            Err(rmcp::service::ServerInitializeError::ConnectionClosed(_)) => return Ok(exit::OK),
            Err(error) => return Err(Failure::failed(format!("failed to talk to the client: {error}"))),
        };
        let ended = running.waiting().await;
        ended.map_err(|e| Failure::failed(format!("failed to talk to the client: {e}")))?;
        Ok(exit::OK)
    });
    // Nobody waits any more for what is under way.
    runtime.shutdown_background();
    ended
}

struct Server {
    asking: Arc<Asking>,
    tool_router: ToolRouter<Self>,
}

impl Server {
    fn new(args: McpArgs) -> Self {
        let mut tool_router = Self::tool_router();
        if !args.allow_get {
            tool_router.remove_route(GET);
        }
        Self {
            asking: Arc::new(args.asking),
            tool_router,
        }
    }

    /// Answers a call. The record, where no daemon runs, is open only for as long as that takes.
    async fn answer(
        &self,
        work: impl FnOnce(&Asking) -> Result<Value, Failure> + Send + 'static,
    ) -> Result<CallToolResult, ErrorData> {
        let asking = Arc::clone(&self.asking);
        let answer = tokio::task::spawn_blocking(move || work(&asking)).await;
        let answer = answer.map_err(|e| ErrorData::internal_error(e.to_string(), None))?;
        Ok(match answer {
            Ok(value) => CallToolResult::structured(value),
            Err(failure) => CallToolResult::error(vec![ContentBlock::text(failure.message)]),
        })
    }
}

#[tool_router]
impl Server {
    #[tool(
        description = "Lists recorded builds, the newest first: state, exit code, workspace, what was downloaded or failed",
        annotations(read_only_hint = true)
    )]
    async fn builds(&self, Parameters(wish): Parameters<BuildsWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(|asking| answers::builds(asking, wish)).await
    }

    #[tool(
        description = "Shows a build with its targets, those that failed first",
        annotations(read_only_hint = true)
    )]
    async fn build(&self, Parameters(wish): Parameters<BuildWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(|asking| answers::build(asking, wish)).await
    }

    #[tool(
        description = "Finds what is on record in the output root of a build, by target and by path, whichever build there made it last: \
                       digest, size, and whether it is on disk",
        annotations(read_only_hint = true)
    )]
    async fn outputs(&self, Parameters(wish): Parameters<OutputsWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(|asking| answers::outputs(asking, wish)).await
    }

    #[tool(
        description = "Tells why outputs were downloaded or not, and where their bytes came from",
        annotations(read_only_hint = true)
    )]
    async fn why(&self, Parameters(wish): Parameters<WhyWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(move |asking| answers::why(asking, &wish)).await
    }

    #[tool(
        description = "Shows the end of a test's logs (test.log of each shard, run and attempt), downloaded if need be",
        annotations(read_only_hint = true)
    )]
    async fn test_log(&self, Parameters(wish): Parameters<LogWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(|asking| answers::test_log(asking, wish)).await
    }

    #[tool(
        description = "Downloads outputs of a build to where the build tool has them, and gives their paths",
        annotations(read_only_hint = false, destructive_hint = false, idempotent_hint = true)
    )]
    async fn get(&self, Parameters(wish): Parameters<GetWish>) -> Result<CallToolResult, ErrorData> {
        self.answer(|asking| answers::get(asking, wish)).await
    }
}

#[tool_handler(router = self.tool_router)]
impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("outhaul", env!("CARGO_PKG_VERSION")))
            .with_instructions(INSTRUCTIONS)
    }
}
