//! Writes what a server sends. Every function appends whole messages to a buffer, except [`copy_data_header`], behind
//! which the caller sends the payload itself.

use bytes::{BufMut, BytesMut};

use super::{Column, tag};
use crate::frame::{put, put_cstr, put_header, wire_len};
use crate::startup::PROTOCOL_MAJOR;

/// The client is let in.
pub fn authentication_ok(out: &mut BytesMut) {
    put(out, tag::AUTHENTICATION, |body| body.put_u32(0));
}

/// A password in clear text is wanted.
pub fn authentication_cleartext_password(out: &mut BytesMut) {
    put(out, tag::AUTHENTICATION, |body| body.put_u32(3));
}

/// Value of a setting.
pub fn parameter_status(out: &mut BytesMut, name: &str, value: &str) {
    put(out, tag::PARAMETER_STATUS, |body| {
        put_cstr(body, name);
        put_cstr(body, value);
    });
}

/// Identity of the session. Stock clients build names of temporary slots from `process_id`, so it has to be unique.
pub fn backend_key_data(out: &mut BytesMut, process_id: u32, secret: u32) {
    put(out, tag::BACKEND_KEY_DATA, |body| {
        body.put_u32(process_id);
        body.put_u32(secret);
    });
}

/// Answers a client that asked for a newer minor version or for extensions: 3.0 it is, without these.
pub fn negotiate_protocol_version<'a>(out: &mut BytesMut, unknown_extensions: impl Iterator<Item = &'a str>) {
    put(out, tag::NEGOTIATE_PROTOCOL_VERSION, |body| {
        body.put_u32(u32::from(PROTOCOL_MAJOR) << 16);
        let names: Vec<&str> = unknown_extensions.collect();
        body.put_u32(wire_len(names.len()));
        names.into_iter().for_each(|name| put_cstr(body, name));
    });
}

/// The server waits for a command, outside a transaction.
pub fn ready_for_query(out: &mut BytesMut) {
    put(out, tag::READY_FOR_QUERY, |body| body.put_u8(b'I'));
}

/// Columns of the rows to come, all in text format and without a type modifier.
pub fn row_description(out: &mut BytesMut, columns: &[Column<'_>]) {
    row_description_modified(out, columns, -1);
}

/// The same with a type modifier, which old servers send where there is none.
pub fn row_description_modified(out: &mut BytesMut, columns: &[Column<'_>], modifier: i32) {
    put(out, tag::ROW_DESCRIPTION, |body| {
        body.put_u16(u16::try_from(columns.len()).unwrap_or(u16::MAX));
        for column in columns {
            let (oid, length) = column.kind.oid_and_len();
            put_cstr(body, column.name);
            body.put_u32(0); // table
            body.put_u16(0); // attribute number
            body.put_u32(oid);
            body.put_i16(length);
            body.put_i32(modifier);
            body.put_u16(0); // text format
        }
    });
}

/// A row; `None` is NULL.
pub fn data_row<T: AsRef<[u8]> + ?Sized>(out: &mut BytesMut, values: &[Option<&T>]) {
    put(out, tag::DATA_ROW, |body| {
        body.put_u16(u16::try_from(values.len()).unwrap_or(u16::MAX));
        for value in values {
            match value {
                None => body.put_i32(-1),
                Some(value) => {
                    body.put_u32(wire_len(value.as_ref().len()));
                    body.put_slice(value.as_ref());
                }
            }
        }
    });
}

/// End of a command.
pub fn command_complete(out: &mut BytesMut, command_tag: &str) {
    put(out, tag::COMMAND_COMPLETE, |body| put_cstr(body, command_tag));
}

/// COPY in both directions begins.
pub fn copy_both_response(out: &mut BytesMut) {
    put(out, tag::COPY_BOTH_RESPONSE, |body| {
        body.put_u8(0);
        body.put_u16(0);
    });
}

/// A CopyData message whose payload `body` writes.
pub fn copy_data(out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    put(out, tag::COPY_DATA, body);
}

/// Header of a CopyData message; the caller sends `payload_len` bytes behind it.
pub fn copy_data_header(out: &mut BytesMut, payload_len: usize) {
    put_header(out, tag::COPY_DATA, payload_len);
}

/// End of a COPY in this direction.
pub fn copy_done(out: &mut BytesMut) {
    put(out, tag::COPY_DONE, |_| {});
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::backend::{BackendMessage, ColumnType};
    use crate::frame;

    /// What `write` appends, as hex, and decoded.
    fn written(write: impl FnOnce(&mut BytesMut)) -> (String, BackendMessage) {
        let mut out = BytesMut::new();
        write(&mut out);
        let text = hex::encode(&out);
        let message = BackendMessage::decode(frame::decode(&mut out, 100_000).unwrap().unwrap()).unwrap();
        assert!(out.is_empty());
        (text, message)
    }

    #[track_caller]
    fn check(write: impl FnOnce(&mut BytesMut), expected_hex: &str) {
        assert_eq!(written(write).0, expected_hex.replace(' ', ""));
    }

    #[test]
    fn framing_of_the_specification() {
        check(copy_both_response, "57 00000007 00 0000");
        check(ready_for_query, "5a 00000005 49");
        check(copy_done, "63 00000004");
        check(authentication_ok, "52 00000008 00000000");
        check(authentication_cleartext_password, "52 00000008 00000003");
        check(
            |out| parameter_status(out, "client_encoding", "UTF8"),
            "53 00000019 636c69656e745f656e636f64696e6700 5554463800",
        );
        check(
            |out| parameter_status(out, "integer_datetimes", "on"),
            "53 00000019 696e74656765725f6461746574696d657300 6f6e00",
        );
        check(
            |out| parameter_status(out, "server_version", "14.1"),
            "53 00000018 7365727665725f76657273696f6e00 31342e3100",
        );
        check(|out| command_complete(out, "IDENTIFY_SYSTEM"), "43 00000014 4944454e544946595f53595354454d00");
        check(|out| command_complete(out, "TIMELINE_STATUS"), "43 00000014 54494d454c494e455f53544154555300");
        check(|out| command_complete(out, "SELECT 1"), "43 0000000d 53454c454354203100");
    }

    #[test]
    fn identify_system_of_the_specification() {
        let columns = [
            Column::text("systemid"),
            Column { name: "timeline", kind: ColumnType::Int4 },
            Column::text("xlogpos"),
            Column::text("dbname"),
        ];
        check(
            |out| row_description(out, &columns),
            "54 0000006f 0004 73797374656d696400 00000000 0000 00000019 ffff ffffffff 0000 74696d656c696e6500 00000000 \
             0000 00000017 0004 ffffffff 0000 786c6f67706f7300 00000000 0000 00000019 ffff ffffffff 0000 \
             64626e616d6500 00000000 0000 00000019 ffff ffffffff 0000",
        );
        check(
            |out| data_row(out, &[Some("1311768467613921697"), Some("1"), Some("0/1A2B3D0"), None]),
            "44 00000033 0004 00000013 31333131373638343637363133393231363937 00000001 31 00000009 302f31413242334430 \
             ffffffff",
        );
    }

    #[test]
    fn timeline_status_of_the_specification() {
        check(
            |out| row_description(out, &[Column::text("flush_lsn"), Column::text("commit_lsn")]),
            "54 0000003f 0002 666c7573685f6c736e00 00000000 0000 00000019 ffff ffffffff 0000 636f6d6d69745f6c736e00 \
             00000000 0000 00000019 ffff ffffffff 0000",
        );
        check(
            |out| data_row(out, &[Some("0/1A2B3D0"), Some("0/1A2B3C8")]),
            "44 00000020 0002 00000009 302f31413242334430 00000009 302f31413242334338",
        );
    }

    #[test]
    fn negotiation_names_every_extension() {
        let (text, message) = written(|out| negotiate_protocol_version(out, ["_pq_.a", "_pq_.b"].into_iter()));
        assert_eq!(text, "760000001a0003000000000002".to_owned() + "5f70715f2e6100" + "5f70715f2e6200");
        let unknown_extensions = vec!["_pq_.a".to_owned(), "_pq_.b".to_owned()];
        assert_eq!(message, BackendMessage::NegotiateProtocolVersion { newest: 196_608, unknown_extensions });
    }

    #[test]
    fn key_data_reads_back() {
        let (_, message) = written(|out| backend_key_data(out, 7, 0x0102_0304));
        assert_eq!(
            message,
            BackendMessage::BackendKeyData { process_id: 7, secret: Bytes::from_static(&[1, 2, 3, 4]) }
        );
    }

    #[test]
    fn header_announces_a_payload_sent_apart() {
        let mut apart = BytesMut::new();
        copy_data_header(&mut apart, 3);
        apart.put_slice(b"abc");
        let mut whole = BytesMut::new();
        copy_data(&mut whole, |body| body.put_slice(b"abc"));
        assert_eq!(apart, whole);
    }

    proptest! {
        #[test]
        fn rows_round_trip(values in prop::collection::vec(prop::option::of(".{0,30}"), 0..20)) {
            let borrowed: Vec<_> = values.iter().map(Option::as_deref).collect();
            let (_, message) = written(|out| data_row(out, &borrowed));
            let expected = values.into_iter().map(|value| value.map(Bytes::from)).collect();
            prop_assert_eq!(message, BackendMessage::DataRow(expected));
        }

        #[test]
        fn columns_and_settings_round_trip(names in prop::collection::vec("[^\0]{0,30}", 0..20), value in "[^\0]{0,30}") {
            let columns: Vec<_> = names.iter().map(|name| Column::text(name)).collect();
            let (_, message) = written(|out| row_description(out, &columns));
            prop_assert_eq!(message, BackendMessage::RowDescription(names));
            let (_, message) = written(|out| parameter_status(out, &value, &value));
            prop_assert_eq!(message, BackendMessage::ParameterStatus { name: value.clone(), value });
        }
    }
}
