//! The untagged packets at the start of a connection, and the settings in them.
//!
//! [`decode`] recognises encryption and cancel requests, direct TLS and the StartupMessage. A [`StartupMessage`] keeps
//! its parameters as sent; [`StartupMessage::options`] reads the settings of the `options` parameter, among them the
//! selector that names a timeline. Nothing here judges: unknown parameters and settings are kept, or ignored.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::frame::{put_cstr, put_length_prefixed};
use crate::ids::ParseIdError;
use crate::read::Reader;
use crate::{DecodeError, TenantId, TenantTimelineId, TimelineId};

/// Smallest first packet: length and code.
pub const MIN_PACKET_LEN: u32 = 8;
/// Largest first packet, as in PostgreSQL.
pub const MAX_PACKET_LEN: u32 = 10_000;
/// Major version of the protocol.
pub const PROTOCOL_MAJOR: u16 = 3;
/// What an encryption request is answered with when there is no encryption.
pub const ENCRYPTION_REFUSED: u8 = b'N';

/// Codes with this "major version" are requests, not versions.
const REQUEST_MAJOR: u16 = 1234;
const CANCEL_MINOR: u16 = 5678;
const SSL_MINOR: u16 = 5679;
const GSS_MINOR: u16 = 5680;
/// Type byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// Prefix of parameters that ask for protocol extensions.
const EXTENSION_PREFIX: &str = "_pq_.";

/// What a client may send first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstPacket {
    /// TLS wanted: answered with one byte, another first packet follows.
    Ssl,
    /// GSSAPI encryption wanted: the same.
    Gss,
    /// Cancel a query: closed without an answer.
    Cancel,
    /// A TLS handshake without asking; the bytes stay in the buffer.
    DirectTls,
    /// A session of protocol 3.
    Startup(StartupMessage),
    /// Another major version, or a request nobody knows.
    UnsupportedVersion {
        /// Upper half of the code.
        major: u16,
        /// Lower half of the code.
        minor: u16,
    },
}

/// Takes the first packet off `buffer`, or nothing while it is incomplete.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<FirstPacket>, DecodeError> {
    if buffer.first() == Some(&TLS_HANDSHAKE) {
        return Ok(Some(FirstPacket::DirectTls));
    }
    let Some(mut field) = buffer.get(..4) else { return Ok(None) };
    let length = field.get_u32();
    if !(MIN_PACKET_LEN..=MAX_PACKET_LEN).contains(&length) {
        return Err(DecodeError::BadLength {
            what: "startup packet",
            length: length.into(),
            min: MIN_PACKET_LEN.into(),
            max: MAX_PACKET_LEN.into(),
        });
    }
    let length = length as usize;
    if buffer.len() < length {
        return Ok(None);
    }
    let mut packet = Reader::new(buffer.split_to(length).freeze());
    packet.u32("length")?;
    let (major, minor) = (packet.u16("major version")?, packet.u16("minor version")?);
    let packet = match (major, minor) {
        (REQUEST_MAJOR, SSL_MINOR) => FirstPacket::Ssl,
        (REQUEST_MAJOR, GSS_MINOR) => FirstPacket::Gss,
        (REQUEST_MAJOR, CANCEL_MINOR) => FirstPacket::Cancel,
        (PROTOCOL_MAJOR, _) => FirstPacket::Startup(StartupMessage::decode_body(minor, packet.rest())?),
        _ => FirstPacket::UnsupportedVersion { major, minor },
    };
    Ok(Some(packet))
}

/// Appends an SSLRequest.
pub fn encode_ssl_request(out: &mut BytesMut) {
    put_length_prefixed(out, |body| {
        body.put_u16(REQUEST_MAJOR);
        body.put_u16(SSL_MINOR);
    });
}

/// Begins a session of protocol 3.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartupMessage {
    /// Minor version asked for; this side speaks 0.
    pub minor_version: u16,
    /// Names and values in the order sent.
    pub parameters: Vec<(String, String)>,
}

/// What kind of session the `replication` parameter asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplicationMode {
    /// A plain session.
    #[default]
    Off,
    /// Physical replication.
    Physical,
    /// Logical replication, connected to a database.
    Database,
}

/// The `replication` parameter had another value than a boolean or `database`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid value for parameter \"replication\": \"{0}\"")]
pub struct InvalidReplicationMode(pub String);

impl StartupMessage {
    fn decode_body(minor_version: u16, body: Bytes) -> Result<Self, DecodeError> {
        let mut body = Reader::new(body);
        let mut parameters = Vec::new();
        loop {
            let name = body.cstr("startup parameter name")?;
            if name.is_empty() {
                break;
            }
            parameters.push((name, body.cstr("startup parameter value")?));
        }
        body.finish("StartupMessage")?;
        Ok(Self { minor_version, parameters })
    }

    /// Appends the packet.
    pub fn encode(&self, out: &mut BytesMut) {
        put_length_prefixed(out, |body| {
            body.put_u16(PROTOCOL_MAJOR);
            body.put_u16(self.minor_version);
            for (name, value) in &self.parameters {
                put_cstr(body, name);
                put_cstr(body, value);
            }
            body.put_u8(0);
        });
    }

    /// Value of a parameter. If a name is repeated the first one wins.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Names of the protocol extensions asked for. None are known here, so all are to be named in
    /// NegotiateProtocolVersion.
    pub fn extensions(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|(name, _)| name.as_str()).filter(|name| name.starts_with(EXTENSION_PREFIX))
    }

    /// Whether the client asks for more than protocol 3.0 has.
    pub fn needs_negotiation(&self) -> bool {
        self.minor_version > 0 || self.extensions().next().is_some()
    }

    /// Reads the `replication` parameter: `database`, or a boolean in any spelling PostgreSQL takes.
    pub fn replication_mode(&self) -> Result<ReplicationMode, InvalidReplicationMode> {
        let Some(value) = self.get("replication") else { return Ok(ReplicationMode::Off) };
        if value.eq_ignore_ascii_case("database") {
            return Ok(ReplicationMode::Database);
        }
        match parse_bool(value) {
            Some(true) => Ok(ReplicationMode::Physical),
            Some(false) => Ok(ReplicationMode::Off),
            None => Err(InvalidReplicationMode(value.to_owned())),
        }
    }

    /// The user's name and, if the `user` parameter is written as `name.tenant_id.timeline_id`, the timeline it names: for
    /// programs that can't send `options`. Anything else is a name as a whole.
    pub fn user(&self) -> (&str, Option<TenantTimelineId>) {
        let whole = self.get("user").unwrap_or_default();
        let mut parts = whole.rsplitn(3, '.');
        let mut named = || {
            let (timeline_id, tenant_id, name) = (parts.next()?, parts.next()?, parts.next()?);
            Some((name, Some(TenantTimelineId::new(tenant_id.parse().ok()?, timeline_id.parse().ok()?))))
        };
        named().unwrap_or((whole, None))
    }

    /// The settings in the `options` parameter; none without it.
    pub fn options(&self) -> Options {
        Options::parse(self.get("options").unwrap_or_default())
    }
}

/// A boolean as PostgreSQL reads it: unique prefixes of true, false, yes, no, on, off, or a digit; in any case.
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    let text = text.to_ascii_lowercase();
    let prefix_of = |word: &str, shortest: usize| text.len() >= shortest && word.starts_with(&text);
    if prefix_of("true", 1) || prefix_of("yes", 1) || text == "on" || text == "1" {
        Some(true)
    } else if prefix_of("false", 1) || prefix_of("no", 1) || prefix_of("off", 2) || text == "0" {
        Some(false)
    } else {
        None
    }
}

/// Settings in a startup packet's `options`, written as for a server's command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    settings: Vec<(String, String)>,
}

/// Which timeline a client wants; whatever it left out is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// `tenant_id`
    pub tenant_id: Option<TenantId>,
    /// `timeline_id`
    pub timeline_id: Option<TimelineId>,
}

impl Options {
    /// Reads `-c name=value`, `-cname=value`, `--name=value` and bare `name=value`, separated by whitespace that is not
    /// escaped with a backslash. Pieces of another form are ignored.
    pub fn parse(text: &str) -> Self {
        let settings = split_words(text)
            .iter()
            .filter_map(|word| {
                let setting = word.strip_prefix("-c").or_else(|| word.strip_prefix("--")).unwrap_or(word);
                let (name, value) = setting.split_once('=')?;
                Some((name.to_owned(), value.to_owned()))
            })
            .collect();
        Self { settings }
    }

    /// Value of a setting. A qualified name (`sk.timeline_id`) counts as the plain one, since a PostgreSQL server listed
    /// beside safekeepers accepts unknown settings only with a dot. The last one wins.
    pub fn get(&self, name: &str) -> Option<&str> {
        let unqualified = |key: &str| key.split_once('.').map_or(key == name, |(_, plain)| plain == name);
        self.settings.iter().rev().find(|(key, _)| unqualified(key)).map(|(_, value)| value.as_str())
    }

    /// The timeline named by `tenant_id` and `timeline_id`, or by their older names `ztenantid` and `ztimelineid`.
    pub fn selector(&self) -> Result<Selector, ParseIdError> {
        let setting = |name, old_name| self.get(name).or_else(|| self.get(old_name));
        Ok(Selector {
            tenant_id: setting("tenant_id", "ztenantid").map(str::parse).transpose()?,
            timeline_id: setting("timeline_id", "ztimelineid").map(str::parse).transpose()?,
        })
    }
}

/// Splits at ASCII whitespace; a backslash takes the next character literally.
fn split_words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            _ if c.is_ascii_whitespace() => words.extend(word.take()),
            '\\' => word.get_or_insert_default().extend(chars.next()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TENANT: &str = "cf0480929707ee75372337efaa5ecf96";
    const TIMELINE: &str = "112ded66422aa5e953e5440fa5427ac4";

    fn decode_hex(text: &str) -> FirstPacket {
        let bytes = hex::decode(text.replace(' ', "")).unwrap();
        decode(&mut BytesMut::from(&bytes[..])).unwrap().unwrap()
    }

    #[test]
    fn requests_of_the_specification() {
        assert_eq!(decode_hex("00000008 04d2162f"), FirstPacket::Ssl);
        assert_eq!(decode_hex("00000008 04d21630"), FirstPacket::Gss);
        assert_eq!(decode_hex("00000010 04d2162e 0000000100000002"), FirstPacket::Cancel);
        assert_eq!(decode_hex("00000008 00020000"), FirstPacket::UnsupportedVersion { major: 2, minor: 0 });
        assert_eq!(decode_hex("00000008 04d20001"), FirstPacket::UnsupportedVersion { major: 1234, minor: 1 });
        assert_eq!(decode_hex("16 0301"), FirstPacket::DirectTls);
        let mut out = BytesMut::new();
        encode_ssl_request(&mut out);
        assert_eq!(hex::encode(out), "0000000804d2162f");
    }

    #[test]
    fn a_user_name_may_name_a_timeline() {
        let user = |text: &str| {
            let message = StartupMessage { minor_version: 0, parameters: vec![("user".into(), text.into())] };
            let (name, ttid) = message.user();
            (name.to_owned(), ttid)
        };
        let ttid = TenantTimelineId::new(TENANT.parse().unwrap(), TIMELINE.parse().unwrap());
        assert_eq!(user(&format!("barman.{TENANT}.{TIMELINE}")), ("barman".to_owned(), Some(ttid)));
        assert_eq!(user(&format!("first.last.{TENANT}.{TIMELINE}")), ("first.last".to_owned(), Some(ttid)));
        for plain in ["", "barman", "a.b.c", TENANT, &format!("x.{TENANT}"), &format!("{TENANT}.{TIMELINE}")] {
            assert_eq!(user(plain), (plain.to_owned(), None));
        }
    }

    #[test]
    fn startup_message_of_the_specification() {
        let packet = "00000092 00030000 7573657200 636c6f75645f61646d696e00 646174616261736500 \
                      7265706c69636174696f6e00 6f7074696f6e7300 2d632074696d656c696e655f69643d31313264656436363432326161\
                      356539353365353434306661353432376163342074656e616e745f69643d636630343830393239373037656537353337\
                      323333376566616135656366393600 00";
        let FirstPacket::Startup(message) = decode_hex(packet) else { panic!("not a StartupMessage") };
        assert_eq!(message.minor_version, 0);
        assert_eq!(message.get("user"), Some("cloud_admin"));
        assert_eq!(message.get("database"), Some("replication"));
        let selector = message.options().selector().unwrap();
        assert_eq!(selector.tenant_id, Some(TENANT.parse().unwrap()));
        assert_eq!(selector.timeline_id, Some(TIMELINE.parse().unwrap()));
        let mut out = BytesMut::new();
        message.encode(&mut out);
        assert_eq!(hex::encode(out), packet.replace(' ', ""));
    }

    #[test]
    fn lengths_outside_the_range_are_refused_at_once() {
        for length in [0_u32, 7, 10_001, u32::MAX] {
            assert!(decode(&mut BytesMut::from(&length.to_be_bytes()[..])).is_err(), "{length}");
        }
        assert_eq!(decode(&mut BytesMut::from(&[0, 0, 0x27][..])), Ok(None));
        assert_eq!(decode(&mut BytesMut::from(&10_000_u32.to_be_bytes()[..])), Ok(None));
    }

    #[test]
    fn every_spelling_of_the_selector() {
        let spellings = [
            format!("-c tenant_id={TENANT} -c timeline_id={TIMELINE}"),
            format!("-ctenant_id={TENANT} -ctimeline_id={TIMELINE}"),
            format!("tenant_id={TENANT} timeline_id={TIMELINE}"),
            format!("  -c\ttimeline_id={TIMELINE}\n tenant_id={TENANT} "),
            format!("-c sk.tenant_id={TENANT} --sk.timeline_id={TIMELINE}"),
            format!("ztenantid={TENANT} ztimelineid={TIMELINE}"),
            format!("-c tenant_id={} timeline_id={TIMELINE} -cdatestyle=iso -d 5 junk", TENANT.to_uppercase()),
            format!("tenant_id=xx timeline_id={TIMELINE} tenant_id={TENANT}"),
        ];
        for text in spellings {
            let selector = Options::parse(&text).selector().unwrap();
            assert_eq!(selector.tenant_id, Some(TENANT.parse().unwrap()), "{text}");
            assert_eq!(selector.timeline_id, Some(TIMELINE.parse().unwrap()), "{text}");
        }
        assert_eq!(Options::parse("").selector(), Ok(Selector::default()));
        assert_eq!(Options::parse("-cdatestyle=iso").selector(), Ok(Selector::default()));
        assert!(Options::parse("timeline_id=12").selector().is_err());
    }

    #[test]
    fn backslash_escapes_whitespace_and_itself() {
        let options = Options::parse(r"-c a=one\ two -c b=back\\slash c=end\");
        assert_eq!(options.get("a"), Some("one two"));
        assert_eq!(options.get("b"), Some(r"back\slash"));
        assert_eq!(options.get("c"), Some("end"));
    }

    #[test]
    fn replication_parameter_takes_booleans_and_database() {
        let mode = |value: &str| {
            StartupMessage { minor_version: 0, parameters: vec![("replication".into(), value.into())] }
                .replication_mode()
        };
        for yes in ["true", "TRUE", "t", "yes", "y", "on", "1"] {
            assert_eq!(mode(yes), Ok(ReplicationMode::Physical), "{yes}");
        }
        for no in ["false", "f", "no", "N", "off", "of", "0"] {
            assert_eq!(mode(no), Ok(ReplicationMode::Off), "{no}");
        }
        assert_eq!(mode("Database"), Ok(ReplicationMode::Database));
        for bad in ["maybe", "o", "", "2", "truely"] {
            assert_eq!(mode(bad), Err(InvalidReplicationMode(bad.into())), "{bad}");
        }
        assert_eq!(StartupMessage::default().replication_mode(), Ok(ReplicationMode::Off));
    }

    #[test]
    fn extensions_and_minor_versions_need_negotiation() {
        let mut message = StartupMessage::default();
        assert!(!message.needs_negotiation());
        message.minor_version = 2;
        assert!(message.needs_negotiation());
        message = StartupMessage { minor_version: 0, parameters: vec![("_pq_.test".into(), "x".into())] };
        assert!(message.needs_negotiation());
        assert_eq!(message.extensions().collect::<Vec<_>>(), ["_pq_.test"]);
    }

    #[test]
    fn first_of_repeated_parameters_wins() {
        let parameters = vec![("user".into(), "a".into()), ("user".into(), "b".into())];
        assert_eq!(StartupMessage { minor_version: 0, parameters }.get("user"), Some("a"));
    }

    proptest! {
        #[test]
        fn round_trip(minor_version: u16, parameters in prop::collection::vec(("[^\0]{1,20}", "[^\0]{0,50}"), 0..10)) {
            let message = StartupMessage { minor_version, parameters };
            let mut out = BytesMut::new();
            message.encode(&mut out);
            prop_assert_eq!(decode(&mut out), Ok(Some(FirstPacket::Startup(message))));
            prop_assert!(out.is_empty());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, body: Vec<u8>) {
            let _ = decode(&mut BytesMut::from(&bytes[..]));
            let _ = StartupMessage::decode_body(0, body.into());
        }

        #[test]
        fn arbitrary_options_never_panic(text: String) {
            let _ = Options::parse(&text).selector();
        }
    }
}
