package pool

import (
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
)

// A volume ID is <name>-<8 hex digits of the pool's UUID>-<8 random hex digits>.
const (
	idNameMax   = 40
	idHexDigits = 8
	idTail      = 2 * (1 + idHexDigits) // bytes behind the name
)

// NewID makes an ID: <name, safe, at most 40>-<8 of the pool's UUID>-<8 random>. At most 58 bytes of a-z, 0-9 and -.
func (p *Pool) NewID(name string) string {
	return strings.Join([]string{safeName(name), p.idPart(), randomHex(idHexDigits)}, "-")
}

// ID is a volume's, well-formed: only what ParseID has seen becomes a part of a path. The zero value is no volume's, and makes a path
// at which nothing can be.
type ID struct{ text string }

// ParseID checks an ID, which may come from anywhere. ErrBadID.
func ParseID(id string) (ID, error) {
	if _, _, ok := splitID(id); !ok {
		return ID{}, fmt.Errorf("%w: %.80q", ErrBadID, id)
	}
	return ID{id}, nil
}

// String returns the ID as NewID has made it.
func (id ID) String() string { return id.text }

// in returns the path of the volume's directory in a part of the pool.
func (id ID) in(part string) string { return part + "/" + id.dir() }

// dir returns the name of the volume's directory.
func (id ID) dir() string { return cmp.Or(id.text, "\x00") }

// ValidID tells whether an ID is well-formed.
func ValidID(id string) bool {
	_, err := ParseID(id)
	return err == nil
}

// Owns tells whether an ID is well-formed, and was made by this pool.
func (p *Pool) Owns(id string) bool {
	_, pool, ok := splitID(id)
	return ok && pool == p.idPart()
}

// idPart is the pool's part of its volumes' IDs.
func (p *Pool) idPart() string { return p.uuid[:idHexDigits] }

// splitID takes an ID apart. Its ends have fixed lengths: the name may look like anything.
func splitID(id string) (name, pool string, ok bool) {
	if len(id) <= idTail || len(id) > idNameMax+idTail {
		return "", "", false
	}
	name, tail := id[:len(id)-idTail], id[len(id)-idTail:]
	pool, random := tail[1:1+idHexDigits], tail[2+idHexDigits:]
	ok = name == safeName(name) && isHex(pool) && isHex(random) && tail[0] == '-' && tail[1+idHexDigits] == '-'
	return name, pool, ok
}

// safeName makes of any name one of 1 to 40 of a-z, 0-9 and -, the latter not at its ends.
func safeName(name string) string {
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r - 'A' + 'a'
		default:
			return '-'
		}
	}, name)
	safe = strings.TrimLeft(safe, "-")
	safe = strings.TrimRight(safe[:min(len(safe), idNameMax)], "-")
	if safe == "" {
		return "volume"
	}
	return safe
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

func randomHex(digits int) string {
	b := make([]byte, digits/2)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// newUUID makes a random one (RFC 9562, version 4).
func newUUID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

func validUUID(s string) bool {
	parts := strings.Split(s, "-")
	if len(parts) != 5 || len(s) != 36 {
		return false
	}
	for i, digits := range []int{8, 4, 4, 4, 12} {
		if len(parts[i]) != digits || !isHex(parts[i]) {
			return false
		}
	}
	return true
}
