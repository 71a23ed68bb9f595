//! `keelson-cri`: reads its configuration, installs tracing, serves until a signal; or imports images for one that serves.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use keelson_cri::containerd::Client;
use keelson_cri::host::asked::MOST_IN_ALL;
use keelson_cri::images::ImageStore;
use keelson_cri::images::auth::Credentials;
use keelson_cri::{config, serve};

/// CRI v1 server on containerd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/keelson/cri.yaml")]
    config: PathBuf,
    /// How lines of the log are written.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// For machines: one object per line.
    Json,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Works on the images of the configured containerd.
    #[command(subcommand)]
    Image(ImageCommand),
}

#[derive(Debug, clap::Subcommand)]
enum ImageCommand {
    /// Imports an archive made by docker save, podman save or ctr export, or an OCI layout in a tar file.
    Import {
        /// The archive, which may be compressed with gzip or zstd.
        file: PathBuf,
        /// Names images that the archive names by a tag only, or not at all: `REPOSITORY` or `REPOSITORY:TAG`.
        #[arg(long)]
        name: Option<String>,
    },
    /// Pulls an image, as a CRI client would ask for it.
    Pull {
        /// The image's reference.
        reference: String,
        /// `USER:PASSWORD` for the registry.
        #[arg(long)]
        creds: Option<String>,
    },
    /// Lists the images: id, size in bytes, names.
    List,
    /// Removes an image with all its names. One that is not there is fine.
    Remove {
        /// A reference or an id.
        image: String,
    },
}

fn main() -> ExitCode {
    keelson_cri::host::memory::economize();
    keelson_cri::host::handles::allow_open_files();
    let arguments = Arguments::parse();
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::builder()
                .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
                .from_env_lossy(),
        );
    match arguments.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        anyhow::bail!("a TLS provider is installed already");
    }
    let config = config::Config::load(&arguments.config)?;
    // Two threads: the work is waiting, and what blocks has threads of its own that end when idle.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(64 + MOST_IN_ALL)
        .enable_all()
        .build()?;
    let ended = match &arguments.command {
        None => runtime.block_on(serve::serve(config)),
        Some(Command::Image(command)) => runtime.block_on(image(&config, command)),
    };
    // Whoever waits for a file system that hangs is not waited for.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    ended
}

async fn image(config: &config::Config, command: &ImageCommand) -> anyhow::Result<()> {
    let client = Client::new(&config.containerd_socket, &config.containerd_namespace)?;
    client.ensure_namespace().await?;
    let images = ImageStore::new(client, config.image_places(), config.images.clone());
    match command {
        ImageCommand::Import { file, name } => {
            for image in images.import(file, name.as_deref()).await? {
                if image.repo_tags.is_empty() && image.repo_digests.is_empty() {
                    tracing::warn!(
                        id = image.id,
                        "the archive gives this image no name; --name gives it one"
                    );
                }
                print(&format!("{} {}", image.id, image.repo_tags.join(" ")))?;
            }
        }
        ImageCommand::Pull { reference, creds } => {
            let credentials = creds.as_deref().map(|pair| {
                let (username, password) = pair.split_once(':').unwrap_or((pair, ""));
                Credentials {
                    username: username.to_owned(),
                    password: password.to_owned(),
                    ..Credentials::default()
                }
            });
            print(&images.pull(reference, credentials).await?.id)?;
        }
        ImageCommand::List => {
            for image in images.list().await? {
                let names = [image.repo_tags.clone(), image.repo_digests.clone()].concat().join(" ");
                print(&format!("{} {} {names}", image.id, image.size()))?;
            }
        }
        ImageCommand::Remove { image } => images.remove(image).await?,
    }
    Ok(())
}

fn print(line: &str) -> std::io::Result<()> {
    writeln!(std::io::stdout().lock(), "{line}")
}
