package hidream

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"testing"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

func piece(info *hidreamv1.ImageInfo, offset int64, data string) *hidreamv1.ImageChunk {
	return &hidreamv1.ImageChunk{Image: info, Offset: offset, Data: []byte(data)}
}

func infoOf(index int32, file string) *hidreamv1.ImageInfo {
	digest := sha256.Sum256([]byte(file))
	return &hidreamv1.ImageInfo{Index: index, SizeBytes: int64(len(file)), Sha256: digest[:]}
}

func TestPiecesOfSeveralImagesBecomeTheirFiles(t *testing.T) {
	first, second := infoOf(0, "one file"), infoOf(1, "another")
	var assembler ImageAssembler
	for _, chunk := range []*hidreamv1.ImageChunk{
		piece(first, 0, "one "), piece(second, 0, "ano"), piece(first, 4, "file"), piece(second, 3, "ther"),
	} {
		if err := assembler.Add(chunk); err != nil {
			t.Fatal(err)
		}
	}
	images, err := assembler.Images(&hidreamv1.Job{Images: []*hidreamv1.ImageInfo{first, second}})
	if err != nil {
		t.Fatal(err)
	}
	for index, want := range []string{"one file", "another"} {
		if !bytes.Equal(images[index].Data, []byte(want)) {
			t.Errorf("image %d is %q, not %q", index, images[index].Data, want)
		}
	}
}

func TestWhatIsNotAsAnnouncedIsRefused(t *testing.T) {
	info := infoOf(0, "one file")
	for name, chunks := range map[string][]*hidreamv1.ImageChunk{
		"a gap":                     {piece(info, 0, "one"), piece(info, 4, "file")},
		"a piece twice":             {piece(info, 0, "one "), piece(info, 0, "one ")},
		"more bytes than announced": {piece(info, 0, "one file too long")},
		"other bytes":               {piece(info, 0, "one fool")},
		"a piece after the last":    {piece(info, 0, "one file"), piece(info, 8, "")},
		"an empty piece":            {piece(info, 0, "one"), piece(info, 3, "")},
		"another image announced":   {piece(info, 0, "one"), piece(infoOf(0, "one fire"), 3, " fire")},
	} {
		t.Run(name, func(t *testing.T) {
			var assembler ImageAssembler
			var err error
			for _, chunk := range chunks {
				err = assembler.Add(chunk)
			}
			if !errors.Is(err, ErrBrokenImage) || !errors.Is(err, ErrBrokenStream) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTheImagesOfAJobAreThoseThatArrived(t *testing.T) {
	info, other := infoOf(0, "one file"), infoOf(0, "one fire")
	for name, test := range map[string]struct {
		chunk *hidreamv1.ImageChunk
		job   []*hidreamv1.ImageInfo
		want  error
	}{
		"not whole":     {piece(info, 0, "one"), []*hidreamv1.ImageInfo{info}, ErrBrokenImage},
		"never begun":   {piece(info, 0, "one file"), []*hidreamv1.ImageInfo{info, infoOf(1, "two")}, ErrBrokenImage},
		"another":       {piece(info, 0, "one file"), []*hidreamv1.ImageInfo{other}, ErrBrokenImage},
		"one too many":  {piece(info, 0, "one file"), nil, ErrBrokenStream},
		"the right one": {piece(info, 0, "one file"), []*hidreamv1.ImageInfo{info}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var assembler ImageAssembler
			if err := assembler.Add(test.chunk); err != nil {
				t.Fatal(err)
			}
			if _, err := assembler.Images(&hidreamv1.Job{Images: test.job}); !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}
