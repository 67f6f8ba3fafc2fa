//! `outhaul ls`: the recorded outputs.

use std::io::Write as _;

use clap::Args;

use super::{client::AskArgs, exit, exit::Failure, print, view};
use crate::{output::Class, printable::printable, proto::outhaul::v1 as pb};

/// Arguments of `outhaul ls`.
#[derive(Debug, Args)]
pub(super) struct LsArgs {
    /// An invocation; by default the newest. Lists everything recorded for its output root
    #[arg(value_name = "ID")]
    id: Option<String>,

    /// Only list outputs of this class
    #[arg(long, value_name = "CLASS", value_parser = ["required", "optional", "known"])]
    class: Option<String>,

    #[command(flatten)]
    ask: AskArgs,
}

pub(super) fn main(args: &LsArgs) -> Result<u8, Failure> {
    args.ask.ask(args.id.as_deref(), async |client| {
        let id = args.id.as_deref().unwrap_or("");
        let class = args.class.as_deref().and_then(Class::named);
        let class = class.map_or(pb::OutputClass::Unspecified, Into::into);
        let result = client
            .outputs(id, class, |output| {
                let mut out = print::out();
                if args.ask.json {
                    writeln!(out, "{}", view::output_json(&output))?;
                } else {
                    writeln!(
                        out,
                        "{:8}  {:12}  {:>10}  {}",
                        output.class().name(),
                        output.state().name(),
                        printable(&view::content(&output)),
                        printable(&output.exec_path)
                    )?;
                }
                Ok(())
            })
            .await;
        result.map(|()| exit::OK)
    })
}
