package hidream

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

const (
	jobID      = "job-1"
	chunkBytes = 100
)

var file = bytes.Repeat([]byte("0123456789"), 45)

// breakingServer has one finished job, whose streams break off where a test says.
type breakingServer struct {
	hidreamv1.UnimplementedImageGenServer
	breaks []int      // how many messages each call sends before it breaks off; later ones send all
	code   codes.Code // with which a call breaks off
	starts []int64    // after_sequence or offset of each call
	damage damage     // what becomes of the pieces of the image on their way; may be nil
	// With which a call breaks off in place of code, where a test wants details.
	refusal error

	generated []*hidreamv1.GenerateRequest
	submitted []string // request ids
	cancelled []string // job ids
	numBusy   int      // how many submissions are refused until later
	isSilent  bool     // calls with one answer get none
}

func (s *breakingServer) job() *hidreamv1.Job {
	digest := sha256.Sum256(file)
	info := &hidreamv1.ImageInfo{SizeBytes: int64(len(file)), Sha256: digest[:]}
	return &hidreamv1.Job{JobId: jobID, Images: []*hidreamv1.ImageInfo{info}}
}

func (s *breakingServer) chunks(offset int64) []*hidreamv1.ImageChunk {
	var chunks []*hidreamv1.ImageChunk
	for start := int(offset); start < len(file); start += chunkBytes {
		end := min(start+chunkBytes, len(file))
		chunks = append(chunks, &hidreamv1.ImageChunk{
			Image: s.job().GetImages()[0], Offset: int64(start), Data: file[start:end],
		})
	}
	if s.damage != nil {
		return s.damage(chunks)
	}
	return chunks
}

func (s *breakingServer) events() []*hidreamv1.JobEvent {
	events := []*hidreamv1.JobEvent{
		{Event: &hidreamv1.JobEvent_Started{Started: &hidreamv1.Started{}}},
		{Event: &hidreamv1.JobEvent_Progress{Progress: &hidreamv1.JobProgress{Step: 1, TotalSteps: 1}}},
	}
	for _, chunk := range s.chunks(0) {
		events = append(events, &hidreamv1.JobEvent{Event: &hidreamv1.JobEvent_ImageChunk{ImageChunk: chunk}})
	}
	succeeded := &hidreamv1.JobEvent_Succeeded{Succeeded: &hidreamv1.Succeeded{Job: s.job()}}
	events = append(events, &hidreamv1.JobEvent{Event: succeeded})
	for i, event := range events {
		event.Sequence = int64(10 * (i + 1))
	}
	return events
}

func sendUntilBreak[Response any](s *breakingServer, responses []*Response, send func(*Response) error) error {
	numSent := len(responses)
	if len(s.breaks) > 0 {
		numSent, s.breaks = s.breaks[0], s.breaks[1:]
	}
	for _, response := range responses[:numSent] {
		if err := send(response); err != nil {
			return err
		}
	}
	if numSent < len(responses) {
		if s.refusal != nil {
			return s.refusal
		}
		return status.Error(s.code, "the server is going away")
	}
	return nil
}

func (s *breakingServer) GetJob(ctx context.Context, _ *hidreamv1.GetJobRequest) (*hidreamv1.Job, error) {
	if s.isSilent {
		<-ctx.Done()
	}
	return s.job(), nil
}

func (s *breakingServer) SubmitJob(_ context.Context, request *hidreamv1.SubmitJobRequest) (*hidreamv1.Job, error) {
	s.submitted = append(s.submitted, request.GetRequestId())
	if s.numBusy == 0 {
		return s.job(), nil
	}
	s.numBusy--
	refusal := status.New(codes.Unavailable, "the model is loading")
	refusal, err := refusal.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)})
	if err != nil {
		return nil, err
	}
	return nil, refusal.Err()
}

func (s *breakingServer) CancelJob(_ context.Context, request *hidreamv1.CancelJobRequest) (*hidreamv1.Job, error) {
	s.cancelled = append(s.cancelled, request.GetJobId())
	return s.job(), nil
}

func (s *breakingServer) Generate(
	request *hidreamv1.GenerateRequest, stream grpc.ServerStreamingServer[hidreamv1.GenerateResponse],
) error {
	s.starts = append(s.starts, 0)
	s.generated = append(s.generated, request)
	var responses []*hidreamv1.GenerateResponse
	for _, event := range s.events() {
		responses = append(responses, &hidreamv1.GenerateResponse{JobId: jobID, Event: event})
	}
	return sendUntilBreak(s, responses, stream.Send)
}

func (s *breakingServer) WatchJob(
	request *hidreamv1.WatchJobRequest, stream grpc.ServerStreamingServer[hidreamv1.WatchJobResponse],
) error {
	s.starts = append(s.starts, request.GetAfterSequence())
	var responses []*hidreamv1.WatchJobResponse
	for _, event := range s.events() {
		if event.GetSequence() > request.GetAfterSequence() {
			responses = append(responses, &hidreamv1.WatchJobResponse{JobId: jobID, Event: event})
		}
	}
	return sendUntilBreak(s, responses, stream.Send)
}

func (s *breakingServer) WatchJobs(
	_ *hidreamv1.WatchJobsRequest, stream grpc.ServerStreamingServer[hidreamv1.WatchJobsResponse],
) error {
	s.starts = append(s.starts, 0)
	var responses []*hidreamv1.WatchJobsResponse
	// Every connection begins with the job as it is then.
	for state := hidreamv1.JobState(len(s.starts)); state <= hidreamv1.JobState_JOB_STATE_SUCCEEDED; state++ {
		job := &hidreamv1.Job{JobId: jobID, State: state}
		responses = append(responses, &hidreamv1.WatchJobsResponse{Job: job})
	}
	return sendUntilBreak(s, responses, stream.Send)
}

func (s *breakingServer) DownloadImage(
	request *hidreamv1.DownloadImageRequest, stream grpc.ServerStreamingServer[hidreamv1.DownloadImageResponse],
) error {
	s.starts = append(s.starts, request.GetOffset())
	var responses []*hidreamv1.DownloadImageResponse
	for _, chunk := range s.chunks(request.GetOffset()) {
		responses = append(responses, &hidreamv1.DownloadImageResponse{Chunk: chunk})
	}
	return sendUntilBreak(s, responses, stream.Send)
}

func (s *breakingServer) listOfJobs(token string) *hidreamv1.ListJobsResponse {
	if token == "" {
		return &hidreamv1.ListJobsResponse{Jobs: []*hidreamv1.Job{{JobId: "3"}, {JobId: "2"}}, NextPageToken: "2"}
	}
	return &hidreamv1.ListJobsResponse{Jobs: []*hidreamv1.Job{{JobId: "1"}}}
}

func (s *breakingServer) ListJobs(
	_ context.Context, request *hidreamv1.ListJobsRequest,
) (*hidreamv1.ListJobsResponse, error) {
	return s.listOfJobs(request.GetPageToken()), nil
}

func clientOf(t *testing.T, service *breakingServer) *Client {
	t.Helper()
	if service.code == codes.OK {
		service.code = codes.Unavailable
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	hidreamv1.RegisterImageGenServer(server, service)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	connection, err := grpc.NewClient(
		listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { connection.Close() })
	return NewClient(connection)
}

func TestAWatchThatBreaksAnywhereMissesNothingAndGetsNothingTwice(t *testing.T) {
	numEvents := len((&breakingServer{}).events())
	for numSent := 1; numSent < numEvents; numSent++ {
		service := &breakingServer{breaks: []int{numSent, 0}}
		var sequences []int64
		images, err := clientOf(t, service).Watch(t.Context(), jobID, ReconnectPolicy{},
			func(event *hidreamv1.JobEvent) { sequences = append(sequences, event.GetSequence()) })
		if err != nil {
			t.Fatalf("broken after %d: %v", numSent, err)
		}
		if want := []int64{10, 20, int64(10 * numEvents)}; !reflect.DeepEqual(sequences, want) {
			t.Errorf("broken after %d: events %v, not %v", numSent, sequences, want)
		}
		if len(images) != 1 || !bytes.Equal(images[0].Data, file) {
			t.Errorf("broken after %d: another file", numSent)
		}
		last := int64(10 * numSent)
		if want := []int64{0, last, last}; !reflect.DeepEqual(service.starts, want) {
			t.Errorf("calls from %v, not %v", service.starts, want)
		}
	}
}

func TestAWatchGivesUpWhenItGetsNoAnswerForTooLong(t *testing.T) {
	service := &breakingServer{breaks: append([]int{1}, make([]int, 1000)...)}
	numLost := 0
	policy := ReconnectPolicy{ReconnectTime: 300 * time.Millisecond, OnConnectionLost: func(error) { numLost++ }}
	_, err := clientOf(t, service).Watch(t.Context(), jobID, policy, nil)
	if status.Code(err) != codes.Unavailable || numLost < 1 || numLost >= 1000 {
		t.Errorf("got %v after %d attempts", err, numLost)
	}
}

func TestAnErrorThatAnotherCallWouldMeetAgainEndsTheWatch(t *testing.T) {
	for name, service := range map[string]*breakingServer{
		"a first call that is not answered": {breaks: []int{0}},
		"a failure":                         {breaks: []int{1}, code: codes.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := clientOf(t, service).Watch(t.Context(), jobID, ReconnectPolicy{}, nil)
			if status.Code(err) != service.code || len(service.starts) != 1 {
				t.Errorf("got %v after %d calls", err, len(service.starts))
			}
		})
	}
}

func TestACallThatIsRefusedForItsDeadlineIsNotMadeAgain(t *testing.T) {
	violation := &errdetails.QuotaFailure_Violation{Subject: "deadline", QuotaId: "deadline"}
	refusal, err := status.New(codes.ResourceExhausted, "too many jobs are in front").WithDetails(
		&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{violation}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)})
	if err != nil {
		t.Fatal(err)
	}
	service := &breakingServer{breaks: []int{1}, refusal: refusal.Err()}
	_, err = clientOf(t, service).Watch(t.Context(), jobID, ReconnectPolicy{}, nil)
	if status.Code(err) != codes.ResourceExhausted || len(service.starts) != 1 {
		t.Errorf("got %v after %d calls", err, len(service.starts))
	}
}

func TestWatchingAllJobsTellsEachChangeOnce(t *testing.T) {
	service := &breakingServer{breaks: []int{2, 1}}
	var states []hidreamv1.JobState
	err := clientOf(t, service).WatchAll(t.Context(), &hidreamv1.WatchJobsRequest{}, ReconnectPolicy{},
		func(change *hidreamv1.WatchJobsResponse) error {
			states = append(states, change.GetJob().GetState())
			return nil
		})
	want := []hidreamv1.JobState{1, 2, 3}
	if !errors.Is(err, ErrBrokenStream) || !reflect.DeepEqual(states, want) {
		t.Errorf("got %v, then %v", states, err)
	}
}

func TestADownloadGoesOnAtTheNextByte(t *testing.T) {
	service := &breakingServer{breaks: []int{2, 0, 1}}
	path := filepath.Join(t.TempDir(), "a.png")
	client := clientOf(t, service)
	giveUp := ReconnectPolicy{ReconnectTime: -1}
	if _, err := client.Download(t.Context(), jobID, 0, path, giveUp); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("half a file has the name of a whole one")
	}
	if _, err := client.Download(t.Context(), jobID, 0, path, giveUp); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	if _, err := client.Download(t.Context(), jobID, 0, path, ReconnectPolicy{}); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, file) {
		t.Errorf("another file: %v", err)
	}
	want := []int64{0, 2 * chunkBytes, 2 * chunkBytes, 3 * chunkBytes}
	if !reflect.DeepEqual(service.starts, want) {
		t.Errorf("calls from %v, not %v", service.starts, want)
	}
}

func TestADownloadWithAnotherSHA256IsNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.png")
	if err := os.WriteFile(partPath(path, jobID, 0), []byte("other bytes"), 0o644); err != nil {
		t.Fatal(err)
	}
	client := clientOf(t, &breakingServer{})
	if _, err := client.Download(t.Context(), jobID, 0, path, ReconnectPolicy{}); !errors.Is(err, ErrBrokenStream) {
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 0 {
		t.Errorf("%v is left", entries)
	}
}

func TestAListGoesThroughItsPages(t *testing.T) {
	var ids []string
	for job, err := range clientOf(t, &breakingServer{}).List(t.Context(), &hidreamv1.ListJobsRequest{}) {
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, job.GetJobId())
	}
	if want := []string{"3", "2", "1"}; !reflect.DeepEqual(ids, want) {
		t.Errorf("got %v", ids)
	}
}
