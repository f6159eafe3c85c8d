//! Where the Hub, its cache and the user's token are: the environment variables of `huggingface_hub`.

use super::HubError;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ENDPOINT: &str = "https://huggingface.co";

/// A secret. It is never part of a message: `Debug` hides it, and there is no `Display`.
#[derive(Clone)]
pub struct Token(
    #[cfg_attr(not(feature = "hub"), allow(dead_code, reason = "only requests show it"))] String,
);

impl Token {
    /// A token as it is sent, or `None` if nothing but white space is left of the text.
    ///
    /// # Errors
    /// When it has characters that cannot be sent. The message does not repeat them.
    pub fn new(text: &str) -> Result<Option<Self>, HubError> {
        let text = text.trim();
        if text.bytes().any(|byte| !byte.is_ascii_graphic()) {
            let message = "holds characters that no token has";
            return Err(HubError::Settings { variable: "HF_TOKEN", message: message.into() });
        }
        Ok((!text.is_empty()).then(|| Self(text.into())))
    }

    /// The value of the header that shows the token to the Hub.
    #[cfg(feature = "hub")]
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

/// How to reach the Hub and its cache.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Address of the Hub or of a mirror, without a slash at its end (`HF_ENDPOINT`).
    pub endpoint: String,
    /// Directory of the repositories (`HF_HUB_CACHE`, else `HF_HOME`/hub).
    pub cache: PathBuf,
    /// Shown to the endpoint and to no other host (`HF_TOKEN`, else the file `HF_TOKEN_PATH` or `HF_HOME`/token).
    pub token: Option<Token>,
    /// Make no request (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// PEM file of the authorities to trust instead of Mozilla's (`SSL_CERT_FILE`).
    pub certificates: Option<PathBuf>,
    /// Attempts at a request that fails for a passing reason, before it is an error.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles with every further one, up to 16 times.
    pub pause: Duration,
}

impl HubSettings {
    /// The settings of this process's environment.
    ///
    /// # Errors
    /// When a variable does not hold what it should, or the token's file cannot be read.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(&|name| std::env::var_os(name))
    }

    /// The settings of some environment. Empty variables count as unset.
    ///
    /// # Errors
    /// When a variable does not hold what it should, or the token's file cannot be read.
    pub fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let user = set("HOME").map(PathBuf::from);
        let path = |name: &str| set(name).map(|value| expand(PathBuf::from(value), user.as_deref()));
        let home = path("HF_HOME")
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| user.as_ref().map(|user| user.join(".cache/huggingface")))
            .ok_or_else(|| HubError::Settings {
                variable: "HF_HOME",
                message: "is not set, nor is HOME".into(),
            })?;
        let token = match set("HF_TOKEN") {
            Some(token) => Token::new(&token.to_string_lossy())?,
            None => read_token(&path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")))?,
        };
        let offline = set("HF_HUB_OFFLINE").map(|value| value.to_string_lossy().to_uppercase());
        Ok(Self {
            endpoint: endpoint(set("HF_ENDPOINT"))?,
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            token,
            offline: offline.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str())),
            certificates: path("SSL_CERT_FILE"),
            attempts: 5,
            pause: Duration::from_millis(500),
        })
    }
}

/// `~/` at the beginning of a path is the user's directory.
fn expand(path: PathBuf, user: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), user) {
        (Ok(rest), Some(user)) => user.join(rest),
        _ => path,
    }
}

fn read_token(path: &Path) -> Result<Option<Token>, HubError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Token::new(&text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HubError::io(path)(error)),
    }
}

/// An address without anything that a message about it would have to hide.
fn endpoint(value: Option<OsString>) -> Result<String, HubError> {
    let Some(value) = value else { return Ok(ENDPOINT.into()) };
    let text = value.to_string_lossy();
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_graphic());
    if rest.is_some_and(|rest| plain(rest) && !rest.contains(['@', '?', '#'])) {
        return Ok(text.trim_end_matches('/').to_owned());
    }
    let message = format!("is not an address such as {ENDPOINT}");
    Err(HubError::Settings { variable: "HF_ENDPOINT", message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings, HubError> {
        HubSettings::from_variables(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn variables_mean_what_they_mean_to_huggingface_hub() {
        let plain = settings(&[("HOME", "/home/a")]).unwrap();
        assert_eq!((plain.endpoint.as_str(), plain.offline), (ENDPOINT, false));
        assert_eq!(plain.cache, Path::new("/home/a/.cache/huggingface/hub"));
        let cache = |variables: &[_]| settings(variables).unwrap().cache;
        let home = ("HOME", "/home/a");
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "~/h"), ("HF_HUB_CACHE", "")]), Path::new("/home/a/h/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(settings(&[home, ("HF_HUB_OFFLINE", "true")]).unwrap().offline);
        assert!(!settings(&[home, ("HF_HUB_OFFLINE", "0")]).unwrap().offline);
        assert_eq!(settings(&[home, ("HF_ENDPOINT", "http://m:8/hf/")]).unwrap().endpoint, "http://m:8/hf");
        for wrong in ["huggingface.co", "ftp://x", "https://", "https://user:secret@host", "http://h?x"] {
            let error = settings(&[home, ("HF_ENDPOINT", wrong)]).unwrap_err().to_string();
            assert!(error.contains("HF_ENDPOINT") && !error.contains("secret"), "{error}");
        }
        assert!(settings(&[]).is_err());
    }

    #[test]
    fn tokens_are_found_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let home = directory.path().to_str().unwrap();
        let text = |settings: &HubSettings| settings.token.as_ref().map(|token| token.0.clone());
        assert_eq!(text(&settings(&[("HF_HOME", home)]).unwrap()), None);
        std::fs::write(directory.path().join("token"), " hf_file\n").unwrap();
        let found = settings(&[("HF_HOME", home)]).unwrap();
        assert_eq!(text(&found).as_deref(), Some("hf_file"));
        assert!(!format!("{found:?}").contains("hf_file"));
        let named = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_variable")]).unwrap();
        assert_eq!(text(&named).as_deref(), Some("hf_variable"));
        let error = settings(&[("HF_HOME", home), ("HF_TOKEN", "hf_a\nhf_b")]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hf_"), "{error:?}");
    }
}
